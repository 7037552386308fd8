"""Measures this machine's matrix products to estimate a run's time, and lists what it lacks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from vlm_tune.kernels.cpu.native import compiler, kernel_status
from vlm_tune.precision import precision_note
from vlm_tune.quoting import applying

MEASURING = 0.3
"""Seconds that a measurement takes."""
WARM_UP = 20
BLOCK = 20
"""Products before a measurement on a GPU, and between two waits for it."""
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

    def product() -> None:
        torch.mm(left, right)

    times = gpu_times(product) if gpu else _cpu_times(product)
    # The median: others may use the machine, and a run will share it with them too.
    middle = sorted(times)[len(times) // 2]
    name = (
        torch.cuda.get_device_name(device)
        if gpu
        else f"this CPU, {torch.get_num_threads()} threads"
    )
    return Machine(
        name, precision, 2.0 * rows * inputs * outputs / middle, _lacks(precision, device)
    )


def _cpu_times(act: Callable[[], None]) -> list[float]:
    """The seconds of calls that take `MEASURING` together, after one more."""

    def once() -> float:
        started = time.perf_counter()
        act()
        return time.perf_counter() - started

    once()
    times = [once()]
    while sum(times) < MEASURING:
        times.append(once())
    return times


def gpu_times(act: Callable[[], None]) -> list[float]:
    """The seconds that the GPU takes for each of many calls, after a warm-up.

    The warm-up loads kernels and lets the clock rise. The calls are queued in blocks, with events
    between them, so that launches and the host's waiting are not timed.
    """
    for _ in range(WARM_UP):
        act()
    torch.cuda.synchronize()
    times: list[float] = []
    while sum(times) < MEASURING:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(BLOCK + 1)]
        marks[0].record()
        for mark in marks[1:]:
            act()
            mark.record()
        marks[-1].synchronize()
        times += [before.elapsed_time(after) / 1000 for before, after in pairwise(marks)]
    return times


def _lacks(precision: str, device: torch.device) -> list[str]:
    """Lists missing hardware and software that would make runs faster."""
    if device.type == "cuda":
        note = precision_note(precision, device)
        return [] if note is None else [note]
    status = kernel_status()
    return applying(
        (True, "no GPU that torch sees"),
        (status.mode != "amx", str(status)),
        (
            compiler() is None,
            "no C++ compiler, so blocks are not compiled and tensors lie where malloc puts them",
        ),
    )
