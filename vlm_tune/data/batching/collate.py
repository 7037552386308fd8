"""Collates examples into a padded batch of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_tune.data.batch import Batch
from vlm_tune.data.images.native import joined_inputs
from vlm_tune.data.images.patches import patch_places, stacked, token_counts
from vlm_tune.data.media_slots import slot_tokens
from vlm_tune.data.packing import numbered_from, separate_rows
from vlm_tune.data.types import IGNORE_INDEX, Example, InputSpec, Media, NativeInputs

if TYPE_CHECKING:
    import torch

    Inputs = torch.Tensor | NativeInputs

Fetch = Callable[[Media], "torch.Tensor | NativeInputs"]
"""Returns the pixels uint8[3, H, W] or the features [N, D] of a media item, or native inputs."""

FetchFor = Callable[[Media, str], "torch.Tensor"]
"""Returns the pixels of a media item, augmented for the sample with the given id."""


def collate(
    examples: Sequence[Example],
    spec: InputSpec,
    *,
    fetch: Fetch | None = None,
    fetch_for: FetchFor | None = None,
    fetch_view: FetchFor | None = None,
    owners: Sequence[str] | None = None,
    cached: bool = False,
    pad_left: bool = False,
) -> Batch:
    """Pads examples into one batch; a media item that several rows share is fetched once.

    Args:
        examples: The rows of the batch; those of preferences are one or several rows each.
        spec: Layout and padding id of the model.
        fetch: Returns a media item's pixels, or its features if `cached`.
        fetch_for: Used in place of `fetch` for augmented images: each item is fetched once for each
            owner.
        fetch_view: Returns another augmentation of each item, for `Batch.views`.
        owners: The sample id that each example's images are augmented for; with `fetch_for`.
        cached: Whether `fetch` returns features.
        pad_left: Pads on the left, for generation with a decoder.

    Returns:
        The batch. `positions`, `visible_until`, `samples` and `label_samples` are set if any row
        was joined from several examples.
    """
    import torch

    groups = [_rows_of(example, spec) for example in examples]
    rows = [row for group in groups for row in group]
    inputs = _Columns([len(row.input_ids) for row in rows], pad_left)
    causal = spec.layout == "causal"
    outputs = inputs if causal else _Columns([len(row.labels) for row in rows])
    owners = owners or [""] * len(groups)
    named = [owner for owner, group in zip(owners, groups, strict=True) for _ in group]
    index, distinct = _distinct(rows, named)
    images, native = _fetched(distinct, index, spec, fetch, fetch_for)
    views = _fetched(distinct, index, spec, None, fetch_view)[0] if fetch_view else None
    return Batch(
        ids=[row.id for row in rows],
        input_ids=inputs.padded([row.input_ids for row in rows], spec.pad_id),
        attention_mask=torch.from_numpy(inputs.filled),
        image_mask=inputs.padded([row.image_mask for row in rows], False),
        labels=outputs.padded([row.labels for row in rows], IGNORE_INDEX),
        media_index=torch.tensor(index, dtype=torch.int64),
        pixels=None if cached else images,
        features=images if cached else None,
        categories=[row.category for row in rows],
        questions=sum(row.questions for row in rows),
        cached=cached,
        native=native,
        views=views,
        patch_places=patch_places([media for media, _ in distinct]),
        **_slots(rows, spec),
        **_joined(rows, inputs, outputs),
        **_preferences(examples, groups, outputs),
    )


def _rows_of(example: Example, spec: InputSpec) -> Sequence[Example]:
    """The rows of an example: one for each of its answers if the model reads no branches."""
    if spec.branches or example.answers is None:
        return [example]
    return separate_rows(example)


@dataclass(frozen=True)
class _Columns:
    """The columns of a padded array that each row fills: as many as its size, from one end."""

    sizes: Sequence[int]
    pad_left: bool = False

    @cached_property
    def filled(self) -> np.ndarray:
        """The places that rows fill: bool[rows, columns], with one column at least."""
        sizes = np.array(self.sizes)[:, None]
        width = max(*self.sizes, 1)
        columns = np.arange(width)
        return columns >= width - sizes if self.pad_left else columns < sizes

    @property
    def starts(self) -> list[int]:
        """The first column of each row."""
        width = self.filled.shape[1]
        return [width - size if self.pad_left else 0 for size in self.sizes]

    def padded(self, rows: Sequence[np.ndarray | int], fill: int | bool) -> torch.Tensor:
        """The rows as one tensor [rows, columns], with `fill` in the places that they leave."""
        import torch

        array = np.full(self.filled.shape, fill, dtype=bool if isinstance(fill, bool) else np.int64)
        array[self.filled] = np.concatenate(
            [
                row if isinstance(row, np.ndarray) else np.full(size, row)
                for row, size in zip(rows, self.sizes, strict=True)
            ]
        )
        return torch.from_numpy(array)


def _joined(examples: Sequence[Example], inputs: _Columns, outputs: _Columns) -> dict[str, Any]:
    """The fields of `Batch` that only rows joined from several examples need."""
    joined: dict[str, Any] = {}
    if any(example.visible_until is not None for example in examples):
        sizes = inputs.sizes
        starts = inputs.starts
        positions = [
            np.arange(size) if e.positions is None else e.positions
            for e, size in zip(examples, sizes, strict=True)
        ]
        visible_until = [
            (size if e.visible_until is None else e.visible_until) + start
            for e, size, start in zip(examples, sizes, starts, strict=True)
        ]
        joined |= {
            "positions": inputs.padded(positions, 0),
            "visible_until": inputs.padded(visible_until, 0),
        }
    if any(example.samples is not None for example in examples):
        samples = [0 if e.samples is None else e.samples for e in examples]
        joined["samples"] = inputs.padded(samples, -1)
    if any(example.label_samples is not None for example in examples):
        label_samples = [0 if e.label_samples is None else e.label_samples for e in examples]
        joined["label_samples"] = outputs.padded(label_samples, -1)
    return joined


def _slots(examples: Sequence[Example], spec: InputSpec) -> dict[str, Any]:
    """The fields of `Batch` that only joined tiles and images that keep their shape need."""
    import torch

    shown = [media for example in examples for media in example.media]
    filling = slot_tokens(shown, spec.tokens_per_image)
    if filling is None:
        return {}
    return {
        "slot_tokens": torch.from_numpy(filling.tokens),
        "slot_shares": None if filling.shares is None else torch.from_numpy(filling.shares),
        "token_counts": token_counts(shown),
    }


def _preferences(
    examples: Sequence[Example], groups: Sequence[Sequence[Example]], outputs: _Columns
) -> dict[str, Any]:
    """The fields of `Batch` that only rows of preferences need; `groups` are examples' rows."""
    import torch

    if all(example.answers is None for example in examples):
        return {}
    firsts = np.cumsum([0, *(example.answer_numbers for example in examples)])
    numbers = [
        -1 if row.answers is None else numbered_from(first, row.answers)
        for group, first in zip(groups, firsts[:-1].tolist(), strict=True)
        for row in group
    ]
    fields = {"answers": outputs.padded(numbers, -1)}
    if any(example.reference is not None for example in examples):
        known = [
            np.full(example.answer_numbers, np.nan, np.float32)
            if example.reference is None
            else example.reference
            for example in examples
        ]
        fields["reference"] = torch.from_numpy(np.concatenate(known))
    return fields


def _distinct(
    examples: Sequence[Example], owners: Sequence[str]
) -> tuple[list[int], list[tuple[Media, str]]]:
    """The index of each media item among the distinct (item, owner) pairs, and these."""
    distinct: dict[tuple[Media, str], int] = {}
    shown = zip(examples, owners, strict=True)
    index = [
        distinct.setdefault((media, owner), len(distinct))
        for example, owner in shown
        for media in example.media
    ]
    return index, list(distinct)


def _fetched(
    distinct: Sequence[tuple[Media, str]],
    index: Sequence[int],
    spec: InputSpec,
    fetch: Fetch | None,
    fetch_for: FetchFor | None,
) -> tuple[torch.Tensor | None, NativeInputs]:
    """The pixels or features of distinct media, stacked, or the native inputs of all in order."""
    items: Sequence[torch.Tensor | NativeInputs] = []
    if fetch_for:
        items = [fetch_for(media, owner) for media, owner in distinct]
    elif fetch:
        items = [fetch(media) for media, _ in distinct]
    native = [item for item in items if isinstance(item, dict)]
    if native:
        return None, joined_inputs([native[place] for place in index], spec.joins)
    pixels = [item for item in items if not isinstance(item, dict)]
    return stacked(pixels, [media for media, _ in distinct]) if pixels else None, {}
