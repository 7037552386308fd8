"""Collates examples into a padded batch of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vlm_tune.data.types import IGNORE_INDEX, Batch, Example, InputSpec, Media

if TYPE_CHECKING:
    import torch

Fetch = Callable[[Media], "torch.Tensor"]
"""Returns the pixels uint8[3, H, W] or the features [N, D] of a media item."""

FetchFor = Callable[[Media, str], "torch.Tensor"]
"""Returns the pixels of a media item, augmented for the sample with the given id."""


def collate(
    examples: Sequence[Example],
    spec: InputSpec,
    *,
    fetch: Fetch | None = None,
    fetch_for: FetchFor | None = None,
    owners: Sequence[str] | None = None,
    cached: bool = False,
    pad_left: bool = False,
) -> Batch:
    """Pads examples into one batch; a media item that several rows share is fetched once.

    Args:
        examples: The rows of the batch.
        spec: Layout and padding id of the model.
        fetch: Returns a media item's pixels, or its features if `cached`.
        fetch_for: Used in place of `fetch` for augmented images: each item is fetched once for each
            owner.
        owners: The sample id that each row's images are augmented for; needed with `fetch_for`.
        cached: Whether `fetch` returns features.
        pad_left: Pads on the left, for generation with a decoder.

    Returns:
        The batch. `positions`, `ends`, `samples` and `label_samples` are set if any row was joined
        from several examples.
    """
    import torch

    rows = len(examples)
    length = max(len(example.input_ids) for example in examples)
    causal = spec.layout == "causal"
    width = length if causal else max(max(len(example.labels) for example in examples), 1)
    sizes = [len(example.input_ids) for example in examples]
    inputs = [slice(length - size, length) if pad_left else slice(0, size) for size in sizes]
    outputs = inputs if causal else [slice(0, len(example.labels)) for example in examples]

    def padded(
        values: Sequence[np.ndarray | int], places: Sequence[slice], across: int, fill: int | bool
    ) -> torch.Tensor:
        array = np.full((rows, across), fill, dtype=bool if isinstance(fill, bool) else np.int64)
        for row, (value, place) in enumerate(zip(values, places, strict=True)):
            array[row, place] = value
        return torch.from_numpy(array)

    joined: dict[str, torch.Tensor] = {}
    if any(example.ends is not None for example in examples):
        shift = [place.start for place in inputs]
        positions = [
            np.arange(size) if e.positions is None else e.positions
            for e, size in zip(examples, sizes, strict=True)
        ]
        ends = [
            (size if e.ends is None else e.ends) + start
            for e, size, start in zip(examples, sizes, shift, strict=True)
        ]
        joined |= {
            "positions": padded(positions, inputs, length, 0),
            "ends": padded(ends, inputs, length, 0),
        }
    if any(example.samples is not None for example in examples):
        joined["samples"] = padded(
            [0 if e.samples is None else e.samples for e in examples], inputs, length, -1
        )
        joined["label_samples"] = padded(
            [0 if e.label_samples is None else e.label_samples for e in examples],
            outputs,
            width,
            -1,
        )
    index, stacked = _media(examples, owners or [""] * rows, fetch, fetch_for)
    return Batch(
        ids=[example.id for example in examples],
        input_ids=padded([example.input_ids for example in examples], inputs, length, spec.pad_id),
        attention_mask=padded([1] * rows, inputs, length, False),
        image_mask=padded([example.image_mask for example in examples], inputs, length, False),
        labels=padded([example.labels for example in examples], outputs, width, IGNORE_INDEX),
        media_index=torch.tensor(index, dtype=torch.int64),
        pixels=None if cached else stacked,
        features=stacked if cached else None,
        categories=[example.category for example in examples],
        questions=sum(example.questions for example in examples),
        cached=cached,
        **joined,
    )


def _media(
    examples: Sequence[Example],
    owners: Sequence[str],
    fetch: Fetch | None,
    fetch_for: FetchFor | None,
) -> tuple[list[int], torch.Tensor | None]:
    """The index of each media item among the distinct (item, owner) pairs, and those stacked."""
    import torch

    distinct: dict[tuple[Media, str], int] = {}
    shown = zip(examples, owners, strict=True)
    index = [
        distinct.setdefault((media, owner), len(distinct))
        for example, owner in shown
        for media in example.media
    ]
    if fetch_for:
        items = [fetch_for(media, owner) for media, owner in distinct]
    else:
        items = [fetch(media) for media, _ in distinct] if fetch else []
    return index, torch.stack(items) if items else None
