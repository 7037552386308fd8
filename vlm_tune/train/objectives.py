"""Training objectives: from a model and a batch to a loss.

A loss is a pair (sum, count), so that any split of a batch gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from vlm_tune.config.train import Contrastive, LanguageModeling
from vlm_tune.data.types import IGNORE_INDEX, Batch
from vlm_tune.transfer import to_device


@dataclass
class Loss:
    """A loss summed over `count` items (tokens, or rows)."""

    sum: torch.Tensor
    count: int


class LanguageModelingObjective:
    """Cross-entropy over the supervised tokens."""

    def count(self, batch: Batch) -> int:
        """Number of supervised tokens."""
        return batch.supervised

    def __call__(self, model: Any, batch: Batch) -> Loss:
        output = model(batch)
        return Loss(output.sum, output.count)


class ContrastiveObjective:
    """Softmax of each image over the distinct captions of its row's category in the batch.

    As in UniCL (arXiv:2204.03610). Equal captions are one class. Captions of another category (a
    shape, for a row about color) are not negatives.
    """

    def __init__(self, config: Contrastive) -> None:
        self.temperature = config.temperature

    def count(self, batch: Batch) -> int:
        """Number of rows that have a caption."""
        return int((batch.on_host.labels != IGNORE_INDEX).any(1).sum())

    def __call__(self, model: Any, batch: Batch) -> Loss:
        vectors = model(batch, align=True)
        captions = [
            (category, tuple(row[row != IGNORE_INDEX].tolist()))
            for category, row in zip(batch.categories, batch.on_host.labels, strict=True)
        ]
        first: dict[tuple[str, tuple[int, ...]], int] = {}
        for row, caption in enumerate(captions):
            if caption[1]:
                first.setdefault(caption, row)
        place = {caption: column for column, caption in enumerate(first)}
        rows = [row for row, caption in enumerate(captions) if caption[1]]
        if not rows:
            return Loss(vectors.images.sum() * 0.0, 0)
        same_category = [[captions[row][0] == category for category, _ in first] for row in rows]
        device = vectors.images.device
        images, distinct, targets, same = (
            to_device(torch.tensor(figures), device)
            for figures in (
                rows,
                list(first.values()),
                [place[captions[row]] for row in rows],
                same_category,
            )
        )
        similarity = vectors.images[images] @ vectors.captions[distinct].T / self.temperature
        similarity = similarity.masked_fill(~same, float("-inf"))
        loss = cross_entropy(similarity, targets, reduction="sum")
        return Loss(loss, len(rows))


Objective = LanguageModelingObjective | ContrastiveObjective

OBJECTIVES: dict[str, Callable[[Any], Objective]] = {
    "language_modeling": lambda config: LanguageModelingObjective(),
    "contrastive": ContrastiveObjective,
}


def build_objective(config: LanguageModeling | Contrastive) -> Objective:
    """The objective of a recipe."""
    return OBJECTIVES[config.kind](config)
