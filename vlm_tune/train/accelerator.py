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

from vlm_tune.compat_engines import allow_precision, launched_without_others
from vlm_tune.config.native import NativeModel
from vlm_tune.config.recipe import Recipe
from vlm_tune.errors import Problem, RecipeError, TrainingError
from vlm_tune.precision import precision_note

BACKENDS = "cuda:nccl,cpu:gloo"
"""Backends of the process group where processes train on GPUs.

CPU tensors go over gloo: gradients and their norm with offloading, and Python objects.
"""

MIXED = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}


def accelerator_of(recipe: Recipe) -> Accelerator:
    """The accelerator in the recipe's precision.

    Raises `RecipeError` if a stage's precision can't be trained in on its device, and
    `TrainingError` if it does not join all processes of the launch.
    """
    check_precisions(recipe)
    precision = MIXED[recipe.train.precision]
    # Another run of this process, or the last stage, may have had another.
    allow_precision(precision)
    accelerator = Accelerator(
        # Without a GPU accelerate joins the processes of a launch only with an explicit `cpu=True`.
        cpu=not _on_accelerator(),
        mixed_precision=precision,
        kwargs_handlers=[
            _group(recipe.train.timeout),
            # DDP sends the gradients themselves and no copies of them.
            DistributedDataParallelKwargs(
                gradient_as_bucket_view=True,
                # A native model's own forward pass may leave out parts, such as a tower of audio.
                find_unused_parameters=isinstance(recipe.model, NativeModel),
            ),
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


def check_precisions(recipe: Recipe) -> None:
    """Raises `RecipeError` if a stage trains in fp16 where no gradient scaler works: on a CPU.

    accelerate would train without a scaler and without autocast, in the weights' own types.
    """
    fp16 = [name for name, stage in recipe.resolved_stages() if stage.train.precision == "fp16"]
    if fp16 and not _on_accelerator():
        hidden = torch.accelerator.is_available()
        why = "ACCELERATE_USE_CPU hides the GPU" if hidden else "torch sees no GPU here"
        message = (
            "fp16 is for GPUs: its gradients need scaling, which a CPU does not do, and "
            f"{why}; use bf16 or fp32"
        )
        raise RecipeError([Problem("train.precision", message)])


def precision_notes(recipe: Recipe, device: torch.device) -> list[str]:
    """Notes for the user on training in the precisions of a recipe's stages on a device."""
    precisions = sorted({stage.train.precision for _, stage in recipe.resolved_stages()})
    notes = [precision_note(precision, device) for precision in precisions]
    return [note for note in notes if note is not None]


def _on_accelerator() -> bool:
    """Whether processes train on GPUs, and not on CPUs."""
    return torch.accelerator.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def _group(timeout: float) -> InitProcessGroupKwargs:
    """Settings of the process group, which has no collective longer than `timeout` seconds."""
    settings = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))
    # accelerate takes a named backend as a sign that there are several processes.
    on_gpus = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    if on_gpus and "LOCAL_RANK" in os.environ:
        settings.backend = BACKENDS
    return settings
