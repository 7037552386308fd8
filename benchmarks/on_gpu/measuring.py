"""Clocks, the search for a batch, and the figures of a measured run; ours and peers' alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.on_gpu.report import Report
from benchmarks.on_gpu.work import Useful
from benchmarks.ours import Amount

WARM, STEPS = 3, 8
"""Steps of a run that don't count, and that do."""

TRIAL_WARM, TRIAL_STEPS = 1, 2
"""The same of a trial of the search for a batch."""

FULL = 0.93
"""Share of the device's memory that a trial may be expected to take."""

GAIN = 1.03
"""A larger batch is tried as long as it brings at least this factor."""


def device_type() -> str:
    """The type of the device: cuda where there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def steps_of(report: Report) -> tuple[int, int]:
    """Steps that don't count, and that do."""
    return (1, 2) if report.tiny else (WARM, STEPS)


class Clock:
    """The times between marks, by CUDA events; on a CPU by the clock.

    An event is recorded behind the work that was launched before it, without waiting for it.
    """

    def __init__(self) -> None:
        self.on_gpu = device_type() == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Notes this point."""
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        """Milliseconds between successive marks."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if not self.on_gpu:
            return [1000 * (after - before) for before, after in pairs]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in pairs]


@dataclass
class Steps:
    """The measurements of one run.

    Attributes:
        batch: Rows, images or packed rows a step.
        clock: Marked before the first step and after each.
        amounts: The text of each step.
        images: Passes of the tower in each step.
        questions: Questions of each step.
        padded: Input tokens of each step with padding.
        weights: Bytes allocated before the first step.
        peak: The most bytes allocated from then on.
        reserved: The most bytes that the allocator took from the device.
    """

    batch: int
    clock: Clock = field(default_factory=Clock)
    amounts: list[Amount] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    questions: list[int] = field(default_factory=list)
    padded: list[int] = field(default_factory=list)
    weights: int = 0
    peak: int = 0
    reserved: int = 0

    def begin(self) -> None:
        """Notes the memory before the first step, and starts the clock."""
        if self.clock.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.weights = torch.cuda.memory_allocated()
        self.clock.mark()

    def end(self) -> None:
        """Notes the peak of the steps."""
        if self.clock.on_gpu:
            self.peak = torch.cuda.max_memory_allocated()
            self.reserved = torch.cuda.max_memory_reserved()

    def figures(self, useful: Useful, warm: int) -> dict[str, Any]:
        """Rates a second over the steps after the first `warm` ones, memory in GB."""
        laps = self.clock.laps()
        counted = slice(warm, min(len(laps), len(self.amounts)))
        seconds = sum(laps[counted]) / 1000
        total = sum(self.amounts[counted], Amount())
        operations = useful.operations(total, sum(self.images[counted]))
        return {
            "batch": self.batch,
            "steps": len(laps[counted]),
            "questions_per_s": sum(self.questions[counted]) / seconds,
            "tokens_per_s": total.tokens / seconds,
            "supervised_per_s": total.supervised / seconds,
            "operations_per_s": operations / seconds,
            "ms": statistics.median(laps[counted]),
            "ms_each": [round(lap, 3) for lap in laps],
            "first_step_s": laps[0] / 1000,
            "padding": 1 - total.tokens / max(sum(self.padded[counted]), 1),
            "questions_a_step": statistics.fmean(self.questions[counted]),
            "tokens_a_step": total.tokens / len(laps[counted]),
            "weights_gb": self.weights / 1e9,
            "peak_gb": self.peak / 1e9,
            "above_weights_gb": (self.peak - self.weights) / 1e9,
            "reserved_gb": self.reserved / 1e9,
        }


Trial = dict[str, Any]
"""The figures of a trial: `questions_per_s`, `weights_gb`, `peak_gb`, `above_weights_gb`."""


def best_batch(
    run: Callable[[int], Trial | None], start: int, most: int, memory_gb: float | None
) -> tuple[int, dict[str, Trial]]:
    """Doubles the batch as long as it fits and pays; returns the fastest, and all trials by batch.

    Args:
        run: Measures a batch; None where memory ran out.
        start: The first batch.
        most: The largest one.
        memory_gb: The device's memory; a batch that is expected to need more is not tried.

    Raises:
        RuntimeError: not even the first batch fits.
    """
    trials: dict[str, Trial] = {}
    fastest = 0.0
    batch = start
    while batch <= most:
        trial = run(batch)
        if trial is None:
            break
        trials[str(batch)] = trial
        if trial["questions_per_s"] < GAIN * fastest:
            break
        fastest = trial["questions_per_s"]
        # What is above the weights grows at most with the batch.
        expected = trial["weights_gb"] + 2 * trial["above_weights_gb"]
        if memory_gb is not None and expected > FULL * memory_gb:
            break
        batch *= 2
    if not trials:
        raise RuntimeError(f"out of memory with a batch of {start}")
    return int(max(trials, key=lambda name: trials[name]["questions_per_s"])), trials


def brief(trial: Trial) -> Trial:
    """The figures of a trial that are worth keeping."""
    names = ("questions_per_s", "ms", "weights_gb", "peak_gb", "above_weights_gb")
    return {name: trial[name] for name in names}


def memory_gb() -> float | None:
    """The device's memory; None on a CPU."""
    if device_type() == "cpu":
        return None
    return torch.cuda.get_device_properties(0).total_memory / 1e9


def or_out_of_memory(measure: Callable[[], Trial]) -> Trial | None:
    """The figures, or None where the device's memory runs out."""
    try:
        return brief(measure())
    except torch.OutOfMemoryError:
        return None
    finally:
        gc.collect()
        if device_type() == "cuda":
            torch.cuda.empty_cache()


def gemm(size: int, repeats: int = 20) -> float:
    """The median rate of a square bf16 product of random numbers, in operations a second."""
    device = device_type()
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    for _ in range(3):
        torch.mm(a, b, out=product)
    clock = Clock()
    clock.mark()
    for _ in range(repeats):
        torch.mm(a, b, out=product)
        clock.mark()
    return 2 * size**3 / statistics.median(clock.laps()) * 1000


def note_gemm(report: Report) -> None:
    """Measures the GEMM rate that MFU is taken on."""
    rate = gemm(256, 3) if report.tiny else gemm(8192)
    report.figure("gemm_per_s", rate)
