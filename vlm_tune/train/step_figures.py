"""The figures of a step: its loss and what its objective logs, summed over ranks and read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator

from vlm_tune.train.objectives import Loss


class MetricSums:
    """The summed figures of a step, and the numbers of items that they are of, on the device."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.sums: torch.Tensor | None = None

    def add(self, loss: Loss) -> None:
        """Adds the figures of a micro-batch."""
        if not self.names:
            return
        figures = [number.float() for name in self.names for number in loss.metrics[name]]
        added = torch.stack(figures)
        self.sums = added if self.sums is None else self.sums + added

    def beside(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar, and after it the sums, to be summed over ranks as one tensor."""
        return loss if self.sums is None else torch.cat([loss.reshape(1), self.sums])

    def named(self, sums: Sequence[float]) -> dict[str, list[float]]:
        """The sum and the number of each figure by its name, from those of all ranks."""
        return {
            name: list(sums[2 * place : 2 * place + 2]) for place, name in enumerate(self.names)
        }

    def read(self) -> dict[str, list[float]]:
        """The sums of this process alone, by name."""
        return {} if self.sums is None else self.named(self.sums.tolist())


def summed(accelerator: Accelerator, figures: torch.Tensor) -> torch.Tensor:
    """The tensor's sum over all ranks."""
    total: Any = accelerator.reduce(figures, "sum")
    return total


def read_figures(
    figures: torch.Tensor, norm: torch.Tensor | None
) -> tuple[list[float], float | None]:
    """The values of figures and of a gradient's norm, where both are on a GPU by one transfer.

    It is the one time in a step that the host waits for the GPU.
    """
    figures = figures.reshape(-1)
    if norm is None:
        return figures.tolist(), None
    if norm.device != figures.device:  # gradients are offloaded
        return figures.tolist(), float(norm)
    *read, norm_read = torch.cat([figures, norm.float().reshape(1)]).tolist()
    return read, norm_read
