"""The part of a step's loss that ties the adapters of tasks to each other."""

from __future__ import annotations

import torch

from vlm_tune.model.task_adapters import task_parameters
from vlm_tune.model.vlm import VisionLanguageNetwork


class TaskTie:
    """Half of a factor times the squared distance of each task's adapter from the tasks' mean.

    Its gradient reaches the adapters of all tasks, also of those without rows in a micro-batch. DDP
    and ZeRO wait for these, so it is a part of the loss also where the factor is 0.
    """

    def __init__(self, model: VisionLanguageNetwork, factor: float) -> None:
        """Ties a model's tasks, which have adapters of their own, by a factor of at least 0."""
        self._groups = task_parameters(model)
        self._factor = factor

    def penalty(self) -> torch.Tensor:
        """The part of the loss, a scalar, by the adapters as they are."""
        squares = []
        for parameters in self._groups:
            stacked = torch.stack([parameter.float() for parameter in parameters])
            squares.append((stacked - stacked.mean(0)).square().sum())
        return torch.stack(squares).sum() * (self._factor / 2)
