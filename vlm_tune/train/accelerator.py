"""accelerate's part: it joins the processes of a launch and casts in the forward pass, and does no more."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)

from vlm_tune.config.recipe import Recipe
from vlm_tune.errors import TrainingError

LAUNCHED_ALONE = {"ACCELERATE_DYNAMO_MODE", "ACCELERATE_USE_CPU", "MASTER_ADDR"}
"""What `accelerate launch` sets where several processes are asked for and it starts one by itself."""

MIXED = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}


def accelerator_of(recipe: Recipe) -> Accelerator:
    """An accelerator in the recipe's precision. Raises `TrainingError` if it does not join all processes of a launch."""
    precision = MIXED[recipe.train.precision]
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        # accelerate keeps a process's first precision for good; another run, or the next stage, may ask for another.
        AcceleratorState._reset_state()
    found = Accelerator(
        # Without a GPU accelerate joins the processes of a launch only where it is told that the CPU is meant.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=precision,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=recipe.train.timeout)),
            # What DDP sends is the gradients themselves, and no copy of theirs.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
        # Not what an accelerate config may say of them: the recipe does.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if found.num_processes != launched:
        raise TrainingError(
            f"{launched} processes were launched and accelerate joins {found.num_processes}"
        )
    if launched == 1 and os.environ.keys() >= LAUNCHED_ALONE:
        raise TrainingError(
            "`accelerate launch` was asked for several processes and started one, as it does on a CPU where its config says "
            "MULTI_CPU, or --cpu is given; give it --multi_gpu (a CPU will do), or take `vlm-tune sft --processes` or torchrun"
        )
    return found
