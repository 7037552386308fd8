"""The accelerate `Accelerator` of a run: it joins the launched processes and autocasts, no more."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    parse_flag_from_env,
)

from vlm_tune.compat import allow_precision, launched_without_others
from vlm_tune.config.recipe import Recipe
from vlm_tune.errors import TrainingError

BACKENDS = "cuda:nccl,cpu:gloo"
"""Backends of the process group where processes train on GPUs.

CPU tensors go over gloo: gradients and their norm with offloading, and Python objects.
"""

MIXED = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}


def accelerator_of(recipe: Recipe) -> Accelerator:
    """The accelerator in the recipe's precision.

    Raises `TrainingError` if it does not join all processes of the launch.
    """
    precision = MIXED[recipe.train.precision]
    # Another run of this process, or the last stage, may have had another.
    allow_precision(precision)
    accelerator = Accelerator(
        # Without a GPU accelerate joins the processes of a launch only with an explicit `cpu=True`.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=precision,
        kwargs_handlers=[
            _group(recipe.train.timeout),
            # DDP sends the gradients themselves and no copies of them.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
        # Given here, so that the recipe decides and not an accelerate config.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise TrainingError(
            f"{launched} processes were launched and accelerate joins {accelerator.num_processes}"
        )
    if launched == 1 and launched_without_others():
        raise TrainingError(
            "`accelerate launch` was asked for several processes and started one, as it does on a "
            "CPU where its config says MULTI_CPU, or --cpu is given; give it --multi_gpu (a CPU "
            "will do), or take `vlm-tune sft --processes` or torchrun"
        )
    return accelerator


def _group(timeout: float) -> InitProcessGroupKwargs:
    """Settings of the process group, which has no collective longer than `timeout` seconds."""
    settings = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))
    # accelerate takes a named backend as a sign that there are several processes.
    on_gpus = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    if on_gpus and "LOCAL_RANK" in os.environ:
        settings.backend = BACKENDS
    return settings
