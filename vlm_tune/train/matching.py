"""Image-text matching: whether an image and a caption belong together, as the LLM answers it.

Shapes: B rows of a micro-batch, k images of each, P rows whose answers are judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from vlm_tune.config.objectives import Matching
from vlm_tune.data.batch import Batch
from vlm_tune.data.types import ANSWER_KINDS, CHOSEN, REJECTED
from vlm_tune.errors import DataError
from vlm_tune.quoting import name_list
from vlm_tune.train.objectives import Counts, Loss
from vlm_tune.transfer import to_device

SHOWN_ANOTHER = 0.5
"""Share of the rows that are shown with another row's image, where there is one to take."""


class MatchingObjective:
    """Binary cross-entropy of the answers yes and no to whether a caption describes an image.

    Each row is a caption with its image, with the two answers as branches (or decoder rows) of one
    prompt. Half of them, drawn again in each step, are shown with the image of another row of the
    micro-batch and of the same category that has another caption.
    """

    metrics: Sequence[str] = ()

    def __init__(self, config: Matching) -> None:
        self.config = config

    def counts(self, batch: Batch) -> Counts:
        """Number of rows."""
        lengths = batch.on_host.answer_lengths
        return Counts(0 if lengths is None else len(lengths) // ANSWER_KINDS)

    def before(self, model: Any, batches: Iterable[Batch], totals: Counts) -> None:
        """Computes nothing: the loss adds over rows."""

    def __call__(self, model: Any, batch: Batch, totals: Counts | None = None) -> Loss:
        images, another = self._drawn_images(model, batch)
        sums = model(_with_images(batch, images), by_answer=True).sums
        count = self.counts(batch).items
        if not count:
            return Loss(sums.sum(), 0)
        answers = sums.view(-1, ANSWER_KINDS)
        # Rows that fill up a batch are alone in it, so the rows are those that are judged.
        margin = answers[:, CHOSEN] - answers[:, REJECTED]
        return Loss(softplus(torch.where(another, margin, -margin)).sum(), count)

    def _drawn_images(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """The row whose image each row is shown with, int64[B], and whether it is another, bool."""
        _check_images(batch)
        device = batch.input_ids.device
        allowed = negative_rows(batch)
        has_any = to_device(allowed.any(1), device)
        scores = torch.zeros(allowed.shape, device=device)
        with torch.no_grad():
            if self.config.negatives == "hard":
                vectors = model(batch, align="prompts")
                scores = vectors.captions @ vectors.images.T / self.config.temperature
            # The largest of logits with Gumbel noise is a draw from their softmax.
            noise = -torch.empty_like(scores).exponential_().log()
            scores = scores.float().masked_fill(~to_device(allowed, device), -torch.inf) + noise
            theirs = torch.arange(len(allowed), device=device)
            another = (torch.rand(len(allowed), device=device) < SHOWN_ANOTHER) & has_any
            return torch.where(another, scores.argmax(1), theirs), another


def negative_rows(batch: Batch) -> Tensor:
    """Which rows' images do not match which rows' captions, bool[B, B] on the host.

    Those of the same category and of as many images, with another prompt and no image in common.
    """
    host = batch.on_host
    _, prompt = host.input_ids.unique(dim=0, return_inverse=True)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(batch.categories))}
    category = torch.tensor([numbers[name] for name in batch.categories])
    images = host.media_index.view(len(batch.ids), -1)
    shared = (images[:, None, :, None] == images[None, :, None, :]).flatten(2).any(2)
    same_prompt = prompt[:, None] == prompt[None]
    # An image that is also shown with this very caption elsewhere in the batch matches it.
    matches = (same_prompt.float() @ shared.float()) > 0
    return (category[:, None] == category[None]) & ~matches


def _check_images(batch: Batch) -> None:
    """Raises `DataError` unless all rows have as many images, and at least one."""
    places = batch.on_host.patch_places
    if places is not None and not bool((places == places[:1]).all()):
        raise DataError(
            f"matching exchanges the images of {name_list(batch.ids)}, and the tower keeps their "
            "shapes, which differ; give images of one size, or take a tower of one shape"
        )
    slots = batch.on_host.image_mask.sum(1)
    if not int(slots[0]) or not bool((slots == slots[0]).all()):
        raise DataError(
            f"matching exchanges the images of {name_list(batch.ids)}, and they have not as many "
            "each; give every row one image, or videos of as many frames"
        )


def _with_images(batch: Batch, rows: Tensor) -> Batch:
    """The batch in which each row has the images of the row of this number, int64[B].

    The rows' words and labels stay, and so do the places that are known on the host.
    """
    shown = copy(batch)
    shown.media_index = batch.media_index.view(len(batch.ids), -1)[rows].flatten()
    return shown
