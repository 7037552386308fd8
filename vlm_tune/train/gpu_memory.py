"""Peak memory of the GPUs that a run trains on, by torch's allocator."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from accelerate import Accelerator


class GpuPeak(TypedDict, total=False):
    """A peak in MB (10^6 bytes), by the names that the log has; empty on a CPU."""

    gpu_memory_mb: int
    gpu_reserved_mb: int


def reset_gpu_peak(device: torch.device) -> None:
    """Begins a new measurement of the device's peak; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def gpu_peak(device: torch.device) -> GpuPeak:
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


def largest_gpu_peak(accelerator: Accelerator) -> GpuPeak:
    """The largest peaks of all processes, as `gpu_peak`; every process must call it."""
    peak = gpu_peak(accelerator.device)
    if not peak:
        return {}
    figures = torch.tensor([list(peak.values())], device=accelerator.device)
    by_rank: Any = accelerator.gather(figures)
    memory, reserved = by_rank.amax(0).tolist()
    return {"gpu_memory_mb": memory, "gpu_reserved_mb": reserved}
