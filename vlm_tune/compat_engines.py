"""Private names of accelerate and DeepSpeed, differences between their versions, and workarounds.

As `vlm_tune.compat`, for the libraries that run several processes.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

# --- accelerate -----------------------------------------------------------------------------------


def allow_precision(precision: str) -> None:
    """Lets the next `Accelerator` have this `mixed_precision`, whatever earlier ones had.

    accelerate keeps the first one for the life of a process. The process group stays.
    """
    from accelerate.state import AcceleratorState, is_initialized

    if is_initialized() and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()


def remove_autocast(model: nn.Module) -> None:
    """Removes the autocast that accelerate wrapped around a model's `forward`, if it did.

    accelerate's `unwrap_model` does so too, but first imports DeepSpeed: that takes a second.
    """
    if vars(model).pop("_original_forward", None) is not None:
        del model.forward


def launched_without_others() -> bool:
    """Whether `accelerate launch` prepared for several processes and started this one alone.

    By the variables that it sets: its launcher of a single process sets all of them only then.
    """
    return os.environ.keys() >= {"ACCELERATE_DYNAMO_MODE", "ACCELERATE_USE_CPU", "MASTER_ADDR"}


# --- DeepSpeed ------------------------------------------------------------------------------------


def build_no_shared_memory_op() -> None:
    """Keeps DeepSpeed from compiling its shared-memory operator, which training does not call.

    DeepSpeed compiles it silently as processes join, behind a lock file that outlives a killed
    process: every later run then waits for that file for ever.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def flat_zero_shards(optimizer: Any, stage: int) -> list[torch.Tensor]:
    """This rank's shards of the fp32 weights of a ZeRO optimizer of stage 1, 2 or 3.

    They are flat: one tensor a parameter group, in stage 3 one or more. The inner optimizer's state
    is keyed by them.
    """
    if stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    return list(optimizer.single_partition_of_fp32_groups)


def link_zero_state(optimizer: Any) -> None:
    """Links parameters to their part of a ZeRO optimizer's state, in stages 1 and 2.

    DeepSpeed does so in its first step; `safe_set_full_optimizer_state` needs it before.
    """
    optimizer._lazy_init_hp_params_optimizer_state()


def is_zero3_parameter(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a parameter whose values DeepSpeed shards (ZeRO stage 3)."""
    return hasattr(tensor, "ds_id")


def zero3_shard_size(parameter: nn.Parameter) -> int:
    """The number of values in a rank's shard of a parameter of ZeRO stage 3, with padding."""
    return parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
