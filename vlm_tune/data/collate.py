"""Examples become a padded batch of tensors; lengths are known, so nothing is searched for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vlm_tune.data.types import IGNORE_INDEX, Batch, Example, InputSpec, Media

if TYPE_CHECKING:
    import torch

Fetch = Callable[[Media], "torch.Tensor"]
"""Gives the pixels uint8[3, H, W] or the features [N, D] of a media item."""


def collate(
    examples: Sequence[Example],
    spec: InputSpec,
    *,
    fetch: Fetch | None = None,
    cached: bool = False,
    pad_left: bool = False,
) -> Batch:
    """A batch of rows; media that rows share come once, from `fetch`, which gives features if `cached`.

    `pad_left` is for generation with a decoder. `positions` and `branches` are there if any row is branched.
    """
    import torch

    rows, length = len(examples), max(len(example.input_ids) for example in examples)
    input_ids = np.full((rows, length), spec.pad_id, dtype=np.int64)
    attention = np.zeros((rows, length), dtype=bool)
    slots = np.zeros((rows, length), dtype=bool)
    branched = any(example.branches is not None for example in examples)
    positions = np.zeros((rows, length), dtype=np.int64) if branched else None
    branches = np.zeros((rows, length), dtype=np.int64) if branched else None
    width = length if spec.layout == "causal" else max(max(len(example.labels) for example in examples), 1)
    labels = np.full((rows, width), IGNORE_INDEX, dtype=np.int64)
    for row, example in enumerate(examples):
        size = len(example.input_ids)
        place = slice(length - size, length) if pad_left else slice(0, size)
        input_ids[row, place] = example.input_ids
        attention[row, place] = True
        slots[row, place] = example.image_mask
        labels[row, place if spec.layout == "causal" else slice(0, len(example.labels))] = example.labels
        if positions is not None and branches is not None:
            positions[row, place] = np.arange(size) if example.positions is None else example.positions
            branches[row, place] = 0 if example.branches is None else example.branches
    distinct: dict[Media, int] = {}
    index = [distinct.setdefault(media, len(distinct)) for example in examples for media in example.media]
    items = torch.stack([fetch(media) for media in distinct]) if distinct and fetch else None
    return Batch(
        ids=[example.id for example in examples],
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention),
        image_mask=torch.from_numpy(slots),
        labels=torch.from_numpy(labels),
        media_index=torch.tensor(index, dtype=torch.int64),
        pixels=None if cached else items,
        features=items if cached else None,
        positions=None if positions is None else torch.from_numpy(positions),
        branches=None if branches is None else torch.from_numpy(branches),
        categories=[example.category for example in examples],
        questions=sum(example.questions for example in examples),
    )
