"""Peak memory of the GPUs that a run trains on, by torch's allocator."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator


def reset_gpu_peak(device: torch.device) -> None:
    """Begins a new measurement of the device's peak; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def gpu_peak(device: torch.device) -> dict[str, int]:
    """This process's peak on the device since the last reset, in MB (10^6 bytes).

    `gpu_memory_mb`: memory of live tensors. `gpu_reserved_mb`: memory that torch took from the
    device for them, unused parts of its blocks included. CUDA's context and other libraries'
    buffers (NCCL) are in neither. Empty on a CPU.
    """
    if device.type != "cuda":
        return {}
    return {
        "gpu_memory_mb": torch.cuda.max_memory_allocated(device) // 1_000_000,
        "gpu_reserved_mb": torch.cuda.max_memory_reserved(device) // 1_000_000,
    }


def largest_gpu_peak(accelerator: Accelerator) -> dict[str, int]:
    """The largest peaks of all processes, as `gpu_peak`; every process must call it."""
    peak = gpu_peak(accelerator.device)
    if not peak:
        return {}
    figures = torch.tensor([list(peak.values())], device=accelerator.device)
    by_rank: Any = accelerator.gather(figures)
    return dict(zip(peak, by_rank.amax(0).tolist(), strict=True))
