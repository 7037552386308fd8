"""Measures this machine's matrix products to estimate a run's time, and lists what it lacks."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from vlm_tune.kernels.cpu.native import compiler, kernel_status

MEASURING = 0.3
"""Seconds that a measurement takes."""
SHAPE = (256, 512, 512)
"""Rows, inputs and outputs of the measured product, as in layers of small language models."""
SHARES = (0.2, 1.0)
"""Shares of the measured rate that whole training steps reach, with small and with large tensors
(docs/plan.md)."""


@dataclass(frozen=True)
class Machine:
    """The device that a run would use here.

    `rate` is the FLOP/s of its matrix products in the run's precision, `lacks` what would make runs
    faster.
    """

    device: str
    precision: str
    rate: float
    lacks: list[str]

    def seconds(self, flops: float) -> tuple[float, float]:
        """The least and the most seconds expected for training steps of so many FLOPs."""
        return flops / (self.rate * SHARES[1]), flops / (self.rate * SHARES[0])


def measure(precision: str, dtype: torch.dtype) -> Machine:
    """Multiplies matrices for `MEASURING` seconds after a warm-up, and takes the median."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    rows, inputs, outputs = (16 * size for size in SHAPE) if gpu else SHAPE
    left = torch.ones(rows, inputs, dtype=dtype, device=device)
    right = torch.ones(inputs, outputs, dtype=dtype, device=device)

    def product() -> float:
        started = time.perf_counter()
        torch.mm(left, right)
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    product()
    times = [product()]
    while sum(times) < MEASURING:
        times.append(product())
    # The median: others may use the machine, and a run will share it with them too.
    middle = sorted(times)[len(times) // 2]
    name = (
        torch.cuda.get_device_name(device)
        if gpu
        else f"this CPU, {torch.get_num_threads()} threads"
    )
    return Machine(name, precision, 2.0 * rows * inputs * outputs / middle, _lacks(gpu))


def _lacks(gpu: bool) -> list[str]:
    """Lists missing hardware and software that would make runs faster."""
    if gpu:
        return []
    status = kernel_status()
    lacks = ["no GPU that torch sees"]
    if status.mode != "amx":
        lacks.append(str(status))
    if compiler() is None:
        lacks.append(
            "no C++ compiler, so blocks are not compiled and tensors lie where malloc puts them"
        )
    return lacks
