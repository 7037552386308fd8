"""Throughput and mean loss between two log lines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import torch

from vlm_tune.data.batch import Batch


class RateFigures(TypedDict):
    """The fields of a log line that `Rates` gives, by their names in `events.TrainSteps`."""

    loss: float
    questions_per_s: float
    tokens_per_s: float
    padding: float
    stall: float
    imbalance: float
    metrics: dict[str, float] | None


@dataclass
class Rates:
    """Throughput since the last log line."""

    start: float = field(default_factory=time.perf_counter)
    questions: int = 0
    tokens: int = 0
    padded: int = 0
    loss: float = 0.0
    count: int = 0
    waited: float = 0.0
    largest: float = 0.0
    mean: float = 0.0
    metrics: dict[str, list[float]] = field(default_factory=dict)
    """A sum and the number of items that it is of, by name."""

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time of the block from the throughput: it is not training."""
        before = time.perf_counter()
        yield
        self.start += time.perf_counter() - before

    def add(self, batch: Batch) -> None:
        self.questions += batch.questions
        self.tokens += batch.tokens
        self.padded += batch.attention_mask.numel()

    def add_metrics(self, metrics: Mapping[str, Sequence[float]]) -> None:
        """Adds sums of an objective's figures and their numbers, by name."""
        for name, (total, number) in metrics.items():
            before, items = self.metrics.get(name, (0.0, 0.0))
            self.metrics[name] = [before + total, items + number]

    def work(self, costs: torch.Tensor) -> None:
        """Adds the costs of a step, one per rank."""
        self.largest, self.mean = (
            self.largest + float(costs.max()),
            self.mean + float(costs.double().mean()),
        )

    def figures(self) -> RateFigures:
        """The mean loss and the throughput until now."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        return {
            "loss": self.loss / max(self.count, 1),
            "questions_per_s": self.questions / seconds,
            "tokens_per_s": self.tokens / seconds,
            "padding": 1 - self.tokens / max(self.padded, 1),
            "stall": self.waited / seconds,
            "imbalance": self.largest / max(self.mean, 1e-9),
            "metrics": metric_means(self.metrics) or None,
        }


def metric_means(sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The means of figures by name, from sums and numbers; those without items are left out.

    The margin of rewards is the difference of their means.
    """
    means = {name: total / number for name, (total, number) in sums.items() if number}
    chosen = means.get("rewards/chosen")
    rejected = means.get("rewards/rejected")
    if chosen is None or rejected is None:
        return means
    return means | {"rewards/margins": chosen - rejected}
