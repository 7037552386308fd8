"""The error of a run that ran out of memory, with what the memory plan says it needs."""

from __future__ import annotations

import os
import traceback

import torch

from vlm_tune.config.recipe import Recipe
from vlm_tune.errors import TrainingError, VlmTuneError
from vlm_tune.quoting import reason_of

NAMED = 3
"""Number of changes that the message names."""
GENERAL = (
    "Halve train.batch_size and double train.gradient_accumulation (the same gradient), or set "
    "train.gradient_checkpointing: true, or model.llm.quantize: nf4"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or in the process."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The CPU allocator of torch has no type for it.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def out_of_memory(error: BaseException, recipe: Recipe) -> TrainingError:
    """The error for a recipe whose memory ran out.

    It names what the recipe needs by the memory plan, and the changes that need least.
    """
    # The traceback's frames hold the batch and its activations.
    traceback.clear_frames(error.__traceback__)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    fault = f"out of memory ({reason_of(error)}); "
    hint = "Finished checkpoints are kept: --resume --accept-changes continues with the changes"
    return TrainingError(f"{fault}{_by_plan(recipe)}. {hint}", by_recipe=True)


def _by_plan(recipe: Recipe) -> str:
    from vlm_tune.memory_plan.plan import plan

    try:
        memory_plan = plan(recipe, processes=int(os.environ.get("WORLD_SIZE", "1")), advise=True)
    except (VlmTuneError, RuntimeError, MemoryError, OSError, ValueError):
        return f"{GENERAL}; `vlm-tune plan` shows what each takes"
    changes = [
        f"{advice.needed / 1e9:.2f} GB with {advice.text}"
        + (f" ({' '.join(f'--set {c}' for c in advice.changes)})" if advice.changes else "")
        for advice in memory_plan.advice[:NAMED]
    ]
    needs = f"by `vlm-tune plan` a process needs {memory_plan.needed / 1e9:.2f} GB"
    return f"{needs}, and {'; '.join(changes)}" if changes else f"{needs}. {GENERAL}"
