"""Training objectives: from a model and a batch to a loss.

A loss is a pair (sum, count), so that any split of a batch gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn.functional import cross_entropy

from vlm_tune.config.objectives import (
    AnyObjective,
    Contrastive,
    LanguageModeling,
    SpanCorruption,
)
from vlm_tune.data.batch import Batch
from vlm_tune.data.types import IGNORE_INDEX
from vlm_tune.model.vlm import Alignment
from vlm_tune.transfer import to_device


class Counts(NamedTuple):
    """The divisors of a step's losses, over all of its micro-batches and ranks.

    Attributes:
        items: supervised tokens, rows, or pairs of answers.
        tokens: supervised tokens of chosen answers, for a loss of them beside that of pairs.
    """

    items: int
    tokens: int = 0

    def __add__(self, other: Counts) -> Counts:  # type: ignore[override]
        return Counts(self.items + other.items, self.tokens + other.tokens)


Metrics = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""A sum and the number of items that it is of, both scalars, by the name of their mean."""


@dataclass
class Loss:
    """A loss summed over `count` items (tokens, or rows).

    Attributes:
        sum: its sum, a scalar.
        count: the number of items.
        metrics: further figures that are logged, without gradients.
    """

    sum: torch.Tensor
    count: int
    metrics: Metrics = field(default_factory=dict)


class Objective(Protocol):
    """A function that a training minimises.

    Attributes:
        metrics: the names of the figures that it logs.
    """

    metrics: Sequence[str]

    @property
    def config(self) -> AnyObjective:
        """The recipe's section."""
        ...

    def counts(self, batch: Batch) -> Counts:
        """The counts that the batch adds to those of its step."""
        ...

    def before(self, model: Any, batches: Iterable[Batch], totals: Counts) -> None:
        """Computes what the losses of a step's micro-batches depend on together."""
        ...

    def __call__(self, model: Any, batch: Batch, totals: Counts | None = None) -> Loss:
        """The loss of a micro-batch of a step with these counts; of its own by default."""
        ...


class LanguageModelingObjective:
    """Cross-entropy over the supervised tokens; those of masked spans are put there by the feed."""

    metrics: Sequence[str] = ()

    def __init__(self, config: LanguageModeling | SpanCorruption) -> None:
        self.config = config
        self._noise = config.image_noise if isinstance(config, LanguageModeling) else 0.0

    def counts(self, batch: Batch) -> Counts:
        """Number of supervised tokens."""
        return Counts(batch.supervised)

    def before(self, model: Any, batches: Iterable[Batch], totals: Counts) -> None:
        """Computes nothing: the loss adds over tokens."""

    def __call__(self, model: Any, batch: Batch, totals: Counts | None = None) -> Loss:
        output = model(batch, image_noise=self._noise)
        return Loss(output.sum, output.count)


class ContrastiveObjective:
    """Softmax of each image over the distinct captions of its row's category in the batch.

    As in UniCL (arXiv:2204.03610). Equal captions are one class. Captions of another category (a
    shape, for a row about color) are not negatives.
    """

    metrics: Sequence[str] = ()

    def __init__(self, config: Contrastive) -> None:
        self.config = config

    def counts(self, batch: Batch) -> Counts:
        """Number of rows that have a caption."""
        return Counts(int((batch.on_host.labels != IGNORE_INDEX).any(1).sum()))

    def before(self, model: Any, batches: Iterable[Batch], totals: Counts) -> None:
        """Computes nothing: the negatives are those of the micro-batch."""

    def __call__(self, model: Any, batch: Batch, totals: Counts | None = None) -> Loss:
        return self.of_vectors(model(batch, align=True), batch)

    def of_vectors(self, vectors: Alignment, batch: Batch) -> Loss:
        """The loss of a batch's vectors."""
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
        similarity = vectors.images[images] @ vectors.captions[distinct].T / self.config.temperature
        similarity = similarity.masked_fill(~same, float("-inf"))
        loss = cross_entropy(similarity, targets, reduction="sum")
        return Loss(loss, len(rows))
