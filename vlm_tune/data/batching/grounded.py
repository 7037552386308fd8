"""Rows with boxes or points whose texts follow the augmentation of their images.

Examples are prepared once, with regions where they are in images as they are. Where an augmentation
moves images, those of rows with regions are laid out again for each epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vlm_tune.config.data import Augment, DataSection
from vlm_tune.data.batching.augmented import Attempts, draw_for
from vlm_tune.data.batching.loader import PreparedFeed
from vlm_tune.data.batching.sampler import Rows
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.chat.truncation import fit
from vlm_tune.data.images.augment import moves_things
from vlm_tune.data.prepare.dataset import Group, Prepared
from vlm_tune.data.regions import regions_of
from vlm_tune.data.types import Conversation, Example
from vlm_tune.errors import DataError

ATTEMPTS = 10
"""Draws of a sample's augmentation, until one leaves its regions in sight."""
LEAST_VISIBLE = 0.5
"""The share of a box that stays in sight."""


@dataclass(frozen=True)
class Follower:
    """Lays a row out with its regions where an epoch's augmentation puts them."""

    augment: Augment
    data: DataSection
    seed: int

    def __call__(
        self, row: Conversation, example: Example, processor: Processor, epoch: int
    ) -> tuple[Example, int | None]:
        """The example of a row in an epoch, and the number of the draw that its images take.

        A draw counts that leaves each point and half of each box in sight, and the row within
        `max_length`. Where none of the first `ATTEMPTS` does, the example stays as it is, and None
        says that its images take no moves.
        """
        regions = regions_of(row)
        width, height = processor.images.frame(*regions[0].size)
        for attempt in range(ATTEMPTS):
            draw = draw_for(self.augment, (self.seed, epoch, example.id), attempt, (height, width))
            moved = draw.places(height, width)
            if any(processor.grounding.visible(each, moved) < LEAST_VISIBLE for each in regions):
                continue
            laid_out = fit(processor.written(row, moved), processor, self.data.overlong).examples
            match = next((each for each in laid_out if each.id == example.id), None)
            if match is not None:
                return replace(match, media=example.media), attempt
        return example, None


def join_fault(data: DataSection) -> str | None:
    """Why rows whose boxes follow their images can't be batched as a data section says; else None.

    Joined rows are planned by their lengths, which change with the numbers of their boxes.
    """
    setting = "packing" if data.packing else "group: image" if data.group == "image" else None
    if setting is None:
        return None
    return (
        "rows have boxes or points, whose texts follow the images that data.augment moves, and "
        f"data.{setting} joins rows by the lengths of texts: leave it out, or take "
        "augmentations that move nothing (colour, hue, grey, noise)"
    )


def check_joins(data: DataSection) -> None:
    """Raises `DataError` where there is a `join_fault`."""
    fault = join_fault(data)
    if fault is not None:
        raise DataError(fault, source="data.augment", kind="box")


def follows(prepared: Prepared) -> bool:
    """Whether a part's rows have regions that its augmentation moves."""
    augment = prepared.data.augment
    return bool(augment and moves_things(augment) and prepared.column("regions").any())


class GroundedFeed(PreparedFeed):
    """Batches of prepared rows, those with regions laid out again in each epoch."""

    def __init__(
        self, prepared: Prepared, *args: Any, processor: Processor, **options: Any
    ) -> None:
        """Takes what `PreparedFeed` takes, and the stage's processor.

        Rows are neither packed nor grouped. Raises `DataError` where a source has changed.
        """
        super().__init__(prepared, *args, **options)
        assert self.augment is not None
        spec = replace(processor.spec, max_length=prepared.data.max_length)
        self.processors = [
            replace(processor, spec=spec).variant(
                source.template, source.system, source.enable_thinking
            )
            for source in prepared.sources
        ]
        self.follower = Follower(self.augment, prepared.data, self.plan.seed)
        self.rows_of_units = _grounded_rows(prepared)

    def _units(self, rows: Rows, epoch: int) -> tuple[list[list[Group]], Attempts]:
        attempts: dict[str, int | None] = {}
        groups = []
        for numbers in rows:
            (number,) = (int(each) for each in numbers)
            row = self.rows_of_units.get(number)
            if row is None:
                groups.append([self.unit(number)])
                continue
            (example,) = self.prepared.unit(number)
            processor = self.processors[self.prepared.unit_sources[number]]
            moved, attempts[example.id] = self.follower(row, example, processor, epoch)
            groups.append([self.completed(number, [moved])])
        return groups, attempts


def _grounded_rows(prepared: Prepared) -> dict[int, Conversation]:
    """The rows with regions, by the number of the unit that is made of them."""
    places = prepared.places(prepared.part)
    grounded = places[prepared.column("regions")[places] > 0]
    rows = dict(zip(grounded.tolist(), prepared.conversations(grounded), strict=True))
    of_units: Sequence[int] = np.repeat(places, prepared.column("examples")[places]).tolist()
    return {unit: rows[place] for unit, place in enumerate(of_units) if place in rows}
