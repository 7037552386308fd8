"""One step in torch's profiler: shares of kernels, idle time, synchronisations, recompiles."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from benchmarks.on_gpu.measuring import device_type

KINDS = (
    ("attention", ("flash", "fmha", "flex", "attention", "softmax")),
    ("matrix products", ("gemm", "cutlass", "nvjet", "xmma", "cublas", "mm", "bmm", "addmm")),
    ("4-bit", ("dequant", "kquant", "4bit")),
    ("compiled", ("triton",)),
    ("optimizer", ("adam", "multi_tensor", "foreach")),
    ("copies", ("memcpy", "memset", "copy_")),
    ("normalisation", ("norm", "reduce")),
    ("elementwise", ("elementwise", "vectorized", "unrolled", "mul", "add", "silu", "gelu")),
)
"""Kinds of kernels by what their names hold; the first that fits counts."""

SYNCHRONISES = (
    "cudaDeviceSynchronize",
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::is_nonzero",
)
"""Names of calls in which the host waits for the device."""

SHOWN = 12
"""Longest kernels that are named."""

Span = tuple[str, float, float]
"""A kernel: its name, its begin and end in microseconds."""


class Profile:
    """The profile of what runs between `start` and `stop`."""

    def __init__(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device_type() == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.inner = torch.profiler.profile(activities=activities)
        self.caught = warnings.catch_warnings(record=True)
        self.warnings: list[Any] | None = None

    def start(self) -> None:
        """Begins, after all that runs on the device has ended."""
        if device_type() == "cuda":
            torch.cuda.synchronize()
        self.warnings = self.caught.__enter__()
        warnings.simplefilter("always")
        if device_type() == "cuda":
            torch.cuda.set_sync_debug_mode("warn")  # a warning for each call that waits
        self.inner.start()

    def stop(self) -> None:
        """Ends, after all that runs on the device has ended."""
        if device_type() == "cuda":
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
        self.caught.__exit__(None, None, None)
        self.inner.stop()

    def summary(self) -> dict[str, Any]:
        """The figures of `summarise`, and how many calls waited for the device.

        On a CPU operators stand for kernels, and no call waits.
        """
        kind = "CUDA" if device_type() == "cuda" else "CPU"
        events: Any = self.inner.events() or []
        spans = [
            (event.name, event.time_range.start, event.time_range.end)
            for event in events
            if event.device_type.name == kind and not (kind == "CPU" and event.cpu_children)
        ]
        waits = sum("synchroniz" in str(one.message) for one in self.warnings or ())
        return {**summarise(spans, [event.name for event in events]), "calls_that_wait": waits}


def summarise(spans: Sequence[Span], names: Iterable[str]) -> dict[str, Any]:
    """Shares of the kernels' time by kind, the share of idle time, and synchronisations by name.

    Args:
        spans: The kernels that ran.
        names: All events, of the host too.
    """
    by_kind: Counter[str] = Counter()
    by_name: Counter[str] = Counter()
    for name, begin, end in spans:
        by_kind[kind_of(name)] += end - begin  # type: ignore[assignment]
        by_name[name] += end - begin  # type: ignore[assignment]
    total = sum(by_kind.values())
    counted = Counter(name for name in names if name in SYNCHRONISES)
    return {
        "shares": {name: spent / total for name, spent in by_kind.most_common()},
        "idle": idle(spans),
        "kernels": len(spans),
        "step_ms": (max(s[2] for s in spans) - min(s[1] for s in spans)) / 1000 if spans else 0.0,
        "synchronisations": dict(counted),
        "longest_ms": {name[:90]: spent / 1000 for name, spent in by_name.most_common(SHOWN)},
    }


def kind_of(name: str) -> str:
    """The kind of a kernel by its name."""
    lower = name.lower()
    return next((kind for kind, parts in KINDS if any(part in lower for part in parts)), "others")


def idle(spans: Sequence[Span]) -> float:
    """The share of the time from the first kernel to the end of the last in which none runs."""
    busy, reached = 0.0, float("-inf")
    for _, begin, end in sorted(spans, key=lambda span: span[1]):
        busy += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    whole = reached - min((begin for _, begin, _ in spans), default=reached)
    return 1 - busy / whole if spans and whole else 0.0


def compilations() -> int:
    """Graphs that were compiled so far in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def graph_breaks() -> dict[str, int]:
    """Reasons for graph breaks so far in this process, with their number."""
    from torch._dynamo.utils import counters

    return {str(reason)[:120]: count for reason, count in counters["graph_break"].items()}
