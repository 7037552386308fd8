"""CLIP's and SigLIP's losses of images and captions, over the micro-batches of all ranks.

Shapes: n rows of this rank's micro-batch that have a caption, N those of all ranks, E width of the
LLM's embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vlm_tune.config.objectives import Contrastive
from vlm_tune.data.types import IGNORE_INDEX, Batch
from vlm_tune.train.objectives import Counts, Loss
from vlm_tune.transfer import to_device

ByRank = Callable[[Sequence[int]], Tensor]
"""A function of this rank's figures: those of all ranks, int64[ranks, figures], on the CPU."""


def single_rank(figures: Sequence[int]) -> Tensor:
    """The `ByRank` of a process that trains alone."""
    return torch.tensor([list(figures)], dtype=torch.int64)


class PairedObjective:
    """open_clip's loss of images and captions: a row is a pair, and all other pairs are negatives.

    The group that negatives come from is a micro-batch of all ranks. The vectors of all ranks are
    gathered with their gradients, so two ranks give the gradient of one with twice the rows.
    Micro-batches that follow each other (gradient accumulation) are groups of their own.
    """

    metrics: Sequence[str] = ()

    def __init__(self, config: Contrastive, by_rank: ByRank = single_rank) -> None:
        from open_clip.loss import ClipLoss, SigLipLoss

        self.config = config
        self.by_rank = by_rank
        # They see the rows of all ranks, and so compute as in one process.
        self.loss: Any = ClipLoss() if config.loss == "clip" else SigLipLoss()
        self._sizes: dict[int, list[int]] = {}
        """The numbers of rows with a caption that the ranks have, by the id of a batch."""

    def counts(self, batch: Batch) -> Counts:
        """Number of rows that have a caption."""
        return Counts(len(captioned_rows(batch)))

    def before(self, model: Any, batches: Iterable[Batch], totals: Counts) -> None:
        """Learns how many rows the micro-batches of the other ranks have."""
        batches = list(batches)
        numbers = self.by_rank([self.counts(batch).items for batch in batches])
        sizes = numbers.T.tolist()
        self._sizes = {id(batch): row for batch, row in zip(batches, sizes, strict=True)}

    def __call__(self, model: Any, batch: Batch, totals: Counts | None = None) -> Loss:
        vectors = model(batch, align=True)
        rows = captioned_rows(batch)
        sizes = self._sizes.get(id(batch), [len(rows)])
        if not sum(sizes):
            return Loss(vectors.images.sum() * 0.0, 0)
        device = vectors.images.device
        chosen = to_device(torch.tensor(rows, dtype=torch.int64), device)
        images, captions = (
            gathered(side.float()[chosen], sizes) for side in (vectors.images, vectors.captions)
        )
        with torch.autocast(device.type, enabled=False):
            mean = self.loss(images, captions, vectors.scale, vectors.bias)
        # Every rank computes the loss of all rows, and the trainer adds the ranks' losses.
        return Loss(mean * (sum(sizes) / len(sizes)), len(rows))


def captioned_rows(batch: Batch) -> list[int]:
    """The numbers of the rows of a batch that have a caption; those that fill it up have none."""
    return (batch.on_host.labels != IGNORE_INDEX).any(1).nonzero()[:, 0].tolist()


def gathered(vectors: Tensor, sizes: Sequence[int]) -> Tensor:
    """The vectors [N, E] of all ranks, by rank, from those of this one, [n, E].

    `sizes` are the numbers of vectors that the ranks have. The gradient goes back to every rank.
    """
    if len(sizes) == 1:
        return vectors
    joined: Any = _Gathered.apply(vectors, sizes)
    return joined


class _Gathered(torch.autograd.Function):
    """Gathers rows of all ranks, whose numbers may differ."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, sizes: Sequence[int]) -> Tensor:  # type: ignore[override]
        start = sum(sizes[: dist.get_rank()])
        ctx.rows = slice(start, start + len(vectors))
        joined = vectors.new_zeros(sum(sizes), vectors.shape[1])
        joined[ctx.rows] = vectors
        dist.all_reduce(joined)
        return joined

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        summed = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed[ctx.rows], None
