"""Retrieval by the vectors that a contrastive objective trains: captions of images, and back.

Equal captions are one, and so are the rows of one image; captions of one image are all right for
it. As in training, rows of another category do not compete.

Shapes: I distinct images, C distinct captions, E width of the vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from vlm_tune.data.batching.collate import Fetch, collate
from vlm_tune.data.types import Conversation
from vlm_tune.errors import DataError
from vlm_tune.evaluation.metrics import Answer, Losses, Ranks, sum_losses
from vlm_tune.model.vlm import Alignment, VisionLanguageNetwork

BLOCK = 1 << 24
"""Similarities that are in memory at a time."""


@dataclass(frozen=True)
class Retrieved:
    """Ranks, nearest captions and losses of rows.

    Attributes:
        ranks: the ranks of its captions and images.
        captions: the caption that is most similar to its image.
        losses: the contrastive loss of each row.
    """

    ranks: list[Ranks]
    captions: list[str]
    losses: np.ndarray


def retrieve(
    model: VisionLanguageNetwork,
    rows: Sequence[Conversation],
    answers: Sequence[Answer],
    *,
    temperature: float | None,
    batch_size: int,
    fetch: Fetch,
    cached: bool,
    progress: Callable[[int, int], None] | None = None,
) -> Retrieved:
    """Ranks all captions for each image, and all images for each caption.

    Args:
        model: the model, in eval mode.
        rows: conversations with one image each, whose last answer is its caption.
        answers: of the rows, with their images and reference answers.
        temperature: that of the contrastive loss; the one that the model has learned where None.
        batch_size: rows per batch.
        fetch: returns the pixels of a media item, or if `cached` the tower's features.
        cached: whether `fetch` returns features.
        progress: called with the number of rows whose vectors are known, and their total.

    Raises:
        DataError: a row has no image or several, or no caption.
    """
    if temperature is None:
        temperature = _learned_temperature(model)
    vectors = _vectors(model, rows, batch_size, fetch, cached, progress)
    ranks: list[Ranks] = [Ranks(0, 0, 0.0, 0.0)] * len(rows)
    captions = [""] * len(rows)
    losses = np.zeros(len(rows))
    groups: dict[str, list[int]] = {}
    for place, answer in enumerate(answers):
        groups.setdefault(answer.category, []).append(place)
    for places in groups.values():
        group = _Group([answers[place] for place in places])
        of_group = group.retrieved(
            Alignment(vectors.images[places], vectors.captions[places]), temperature
        )
        for number, place in enumerate(places):
            ranks[place] = of_group.ranks[number]
            captions[place] = of_group.captions[number]
            losses[place] = of_group.losses[number]
    return Retrieved(ranks, captions, losses)


@torch.inference_mode()
def _learned_temperature(model: VisionLanguageNetwork) -> float:
    """The temperature that the model has learned for its similarities; 1 if it has learned none."""
    return 1.0 if model.similarity is None else 1 / float(model.similarity()[0])


def with_ranks(answers: Sequence[Answer], retrieved: Retrieved, *, answering: bool) -> list[Answer]:
    """The answers with their ranks, and if `answering` with the nearest caption as their text.

    That one is right where it is any of the image's captions.
    """
    ranked = [
        replace(answer, ranks=ranks) for answer, ranks in zip(answers, retrieved.ranks, strict=True)
    ]
    if not answering:
        return ranked
    return [
        replace(answer, generated=caption, correct=ranks.text == 1)
        for answer, ranks, caption in zip(ranked, retrieved.ranks, retrieved.captions, strict=True)
    ]


def losses_by_source(answers: Sequence[Answer], retrieved: Retrieved) -> Losses:
    """The summed contrastive loss of each source's rows, and their number."""
    rows = zip(answers, retrieved.losses.tolist(), strict=True)
    return sum_losses((answer.source, loss, 1) for answer, loss in rows)


@torch.inference_mode()
def _vectors(
    model: VisionLanguageNetwork,
    rows: Sequence[Conversation],
    batch_size: int,
    fetch: Fetch,
    cached: bool,
    progress: Callable[[int, int], None] | None,
) -> Alignment:
    """The vectors of each row's image and caption, on the CPU in fp32."""
    images = []
    captions = []
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        if any(len(row.media) != 1 for row in chosen):
            raise DataError("retrieval compares rows with exactly one image each and its caption")
        examples = [model.processor.examples(row)[-1] for row in chosen]
        batch = collate(examples, model.processor.spec, fetch=fetch, cached=cached)
        aligned = model(batch.to(model.device), align=True)
        assert isinstance(aligned, Alignment)
        images.append(aligned.images.float().cpu())
        captions.append(aligned.captions.float().cpu())
        if progress:
            progress(start + len(chosen), len(rows))
    return Alignment(torch.cat(images), torch.cat(captions))


class _Group:
    """Rows that compete: their distinct images and captions, and which belong together.

    `image_of` and `caption_of` int64[rows] are the places of a row's image and caption among the
    distinct ones, `first_images` and `first_captions` the first row of each.
    """

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.answers = answers
        self.image_of, self.first_images = _distinct([answer.images[0] for answer in answers])
        self.caption_of, self.first_captions = _distinct([answer.expected for answer in answers])

    def retrieved(self, vectors: Alignment, temperature: float) -> Retrieved:
        """Ranks, nearest captions and losses, from the rows' vectors."""
        images = vectors.images[self.first_images]
        captions = vectors.captions[self.first_captions]
        pairs = torch.zeros(len(images), len(captions), dtype=torch.bool)
        pairs[self.image_of, self.caption_of] = True
        text_ranks, nearest = _ranks(images, captions, pairs)
        image_ranks, _ = _ranks(captions, images, pairs.T)
        losses = self._losses(images, captions, temperature)
        text_shares = 1 / torch.bincount(self.image_of)[self.image_of]
        image_shares = 1 / torch.bincount(self.caption_of)[self.caption_of]
        columns = (
            text_ranks[self.image_of].tolist(),
            image_ranks[self.caption_of].tolist(),
            text_shares.tolist(),
            image_shares.tolist(),
        )
        texts = [
            self.answers[self.first_captions[place]].expected
            for place in nearest[self.image_of].tolist()
        ]
        return Retrieved([Ranks(*row) for row in zip(*columns, strict=True)], texts, losses)

    def _losses(
        self, images: torch.Tensor, captions: torch.Tensor, temperature: float
    ) -> np.ndarray:
        """The cross-entropy of each row's caption among all captions, for its image."""
        rows = max(BLOCK // len(captions), 1)
        parts = []
        for start in range(0, len(self.image_of), rows):
            chosen = slice(start, start + rows)
            scores = images[self.image_of[chosen]] @ captions.T / temperature
            targets = self.caption_of[chosen]
            parts.append(torch.nn.functional.cross_entropy(scores, targets, reduction="none"))
        return torch.cat(parts).double().numpy()


def _distinct(names: Sequence[str]) -> tuple[torch.Tensor, list[int]]:
    """The number of each name among the distinct ones, and the first place of each."""
    first: dict[str, int] = {}
    numbers: dict[str, int] = {}
    for place, name in enumerate(names):
        first.setdefault(name, place)
        numbers.setdefault(name, len(numbers))
    return torch.tensor([numbers[name] for name in names]), list(first.values())


def _ranks(
    queries: torch.Tensor, gallery: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rank, from 1, of each query's best right entry, and the most similar entry of any kind.

    A wrong entry that is as similar counts as before the right one, so a model whose vectors are
    all equal, or not finite, finds nothing.

    Args:
        queries: unit vectors fp32[Q, E].
        gallery: unit vectors fp32[G, E].
        right: which entries are right for a query, bool[Q, G]; at least one is.
    """
    rows = max(BLOCK // len(gallery), 1)
    ranks = []
    nearest = []
    for start in range(0, len(queries), rows):
        scores = queries[start : start + rows] @ gallery.T
        mask = right[start : start + rows]
        best = scores.masked_fill(~mask, -torch.inf).max(1).values[:, None]
        ranks.append(((~(scores < best)) & ~mask).sum(1) + 1)
        nearest.append(scores.argmax(1))
    return torch.cat(ranks), torch.cat(nearest)
