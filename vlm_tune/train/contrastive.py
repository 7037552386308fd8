"""CLIP's, SigLIP's and SimCLR's losses, over the micro-batches of all ranks.

Shapes: n rows of this rank's micro-batch that have a caption, N those of all ranks, E width of the
LLM's embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from vlm_tune.config.objectives import Contrastive
from vlm_tune.data.batch import Batch
from vlm_tune.data.types import IGNORE_INDEX
from vlm_tune.model.vlm import Alignment
from vlm_tune.train.objectives import Counts, Loss, Objective
from vlm_tune.transfer import to_device

ByRank = Callable[[Sequence[int]], Tensor]
"""A function of this rank's figures: those of all ranks, int64[ranks, figures], on the CPU."""


def single_rank(figures: Sequence[int]) -> Tensor:
    """The `ByRank` of a process that trains alone."""
    return torch.tensor([list(figures)], dtype=torch.int64)


class Groups:
    """The numbers of rows with a caption that the micro-batches of a step have on each rank.

    A micro-batch of all ranks is the group that negatives come from.
    """

    def __init__(self, by_rank: ByRank) -> None:
        self.by_rank = by_rank
        self._sizes: dict[int, list[int]] = {}
        """By the id of a batch."""

    def learn(self, batches: Sequence[Batch]) -> None:
        """Gathers the numbers of a step."""
        numbers = self.by_rank([len(captioned_rows(batch)) for batch in batches])
        sizes = numbers.T.tolist()
        self._sizes = {id(batch): row for batch, row in zip(batches, sizes, strict=True)}

    def sizes(self, batch: Batch) -> list[int]:
        """The numbers by rank of a batch's group; its own alone where none were gathered."""
        return self._sizes.get(id(batch)) or [len(captioned_rows(batch))]


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
        self.groups = Groups(by_rank)
        # They see the rows of all ranks, and so compute as in one process.
        self.loss: Any = ClipLoss() if config.loss == "clip" else SigLipLoss()

    def counts(self, batch: Batch) -> Counts:
        """Number of rows that have a caption."""
        return Counts(len(captioned_rows(batch)))

    def before(self, model: Any, batches: Iterable[Batch], totals: Counts) -> None:
        """Learns how many rows the micro-batches of the other ranks have."""
        self.groups.learn(list(batches))

    def __call__(self, model: Any, batch: Batch, totals: Counts | None = None) -> Loss:
        return self.of_vectors(model(batch, align=True), batch)

    def of_vectors(self, vectors: Alignment, batch: Batch) -> Loss:
        """The loss of a batch's vectors."""
        sizes = self.groups.sizes(batch)
        images, captions = gathered_rows((vectors.images, vectors.captions), batch, sizes)
        if not len(images):
            return Loss(vectors.images.sum() * 0.0, 0)
        with torch.autocast(images.device.type, enabled=False):
            mean = self.loss(images, captions, vectors.scale, vectors.bias)
        return of_all_ranks(mean, batch, sizes)


class ViewsObjective:
    """NT-Xent, the loss of SimCLR (arXiv:2002.05709), of two augmented views of each image.

    A view's positive is the other one of its image; both views of all other images of a micro-batch
    of all ranks are negatives. The loss of images and captions may be added, by the first views.
    """

    metrics: Sequence[str] = ()

    def __init__(
        self, config: Contrastive, text: TextObjective | None, by_rank: ByRank = single_rank
    ) -> None:
        """Takes the objective of images and captions, for `views: both`."""
        self.config = config
        self.text = text
        self.groups = Groups(by_rank)

    def counts(self, batch: Batch) -> Counts:
        """Number of rows that have a caption; those that fill up a batch have none."""
        return Counts(len(captioned_rows(batch)))

    def before(self, model: Any, batches: Iterable[Batch], totals: Counts) -> None:
        """Learns how many rows the micro-batches of the other ranks have."""
        batches = list(batches)
        self.groups.learn(batches)
        if self.text is not None:
            self.text.before(model, batches, totals)

    def __call__(self, model: Any, batch: Batch, totals: Counts | None = None) -> Loss:
        vectors: Alignment = model(batch, align=True)
        assert vectors.views is not None
        sizes = self.groups.sizes(batch)
        firsts, seconds = gathered_rows((vectors.images, vectors.views), batch, sizes)
        if not len(firsts):
            return Loss((vectors.images.sum() + vectors.views.sum()) * 0.0, 0)
        with torch.autocast(firsts.device.type, enabled=False):
            loss = of_all_ranks(nt_xent(firsts, seconds, self.config.temperature), batch, sizes)
        if self.text is not None:
            loss.sum = loss.sum + self.text.of_vectors(vectors, batch).sum
        return loss


class TextObjective(Objective, Protocol):
    """A loss of images and captions that can be computed of vectors."""

    def of_vectors(self, vectors: Alignment, batch: Batch) -> Loss:
        """The loss of a batch's vectors."""
        ...


def nt_xent(firsts: Tensor, seconds: Tensor, temperature: float) -> Tensor:
    """The mean cross-entropy of each view among all others but itself, whose target is its pair.

    Args:
        firsts: Unit vectors [N, E] of first views.
        seconds: Those of the same images' second views.
        temperature: What similarities are divided by.
    """
    views = torch.cat([firsts, seconds])
    similarity = views @ views.T / temperature
    itself = torch.eye(len(views), dtype=torch.bool, device=views.device)
    pairs = torch.arange(len(views), device=views.device).roll(len(firsts))
    return cross_entropy(similarity.masked_fill(itself, -torch.inf), pairs)


def gathered_rows(
    sides: Sequence[Tensor], batch: Batch, sizes: Sequence[int]
) -> tuple[Tensor, ...]:
    """The vectors fp32[N, E] of all ranks' rows that have a caption, from this rank's [B, E]."""
    rows = to_device(torch.tensor(captioned_rows(batch), dtype=torch.int64), sides[0].device)
    return tuple(gathered(side.float()[rows], sizes) for side in sides)


def of_all_ranks(mean: Tensor, batch: Batch, sizes: Sequence[int]) -> Loss:
    """The loss of this rank's rows, from the mean over all, which every rank computes alike.

    The trainer adds the ranks' losses.
    """
    return Loss(mean * (sum(sizes) / len(sizes)), len(captioned_rows(batch)))


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
