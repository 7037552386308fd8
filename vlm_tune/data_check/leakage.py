"""Rows and images that come more than once: repeated rows, and rows of one part that another part shows too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vlm_tune.data.prepare.dataset import Prepared
from vlm_tune.data.prepare.duplicates import ImageInfo, look_alikes

MIX = np.uint64(0x9E3779B97F4A7C15)
"""An odd multiplier, so that the order of a row's images counts."""

Name = tuple[str, int]
"""Source and row."""


@dataclass(frozen=True)
class PartRows:
    """Usable rows of prepared ones: those of one part, by their places."""

    prepared: Prepared
    places: np.ndarray

    @cached_property
    def keys(self) -> np.ndarray:
        """uint64[rows]: equal where the text (case and white space aside) and the bytes of the images are."""
        return self._mixed("text")

    @property
    def contents(self) -> np.ndarray:
        """uint64[rows]: equal where the exact texts and the bytes of the images are; of rows that can't be read, what stands there."""
        return self._mixed("digest")

    def _mixed(self, column: str) -> np.ndarray:
        """A column's hashes mixed with those of each row's images."""
        found = self.prepared.column(column)[self.places].astype(np.uint64)
        shown, offsets = self.prepared.shown
        digests = np.array(
            [int.from_bytes(row.info.sha256[:8], "little") for row in self.prepared.media_rows],
            dtype=np.uint64,
        )
        starts = offsets[self.places]
        counts = np.diff(offsets)[self.places]
        for number in range(int(counts.max(initial=0))):
            has = counts > number
            found[has] = found[has] * MIX + digests[shown[starts[has] + number]]
        return found

    @cached_property
    def first_rows(self) -> dict[int, int]:
        """For each media number that the rows show, the place of the first row that does."""
        shown, offsets = self.prepared.shown
        counts = np.diff(offsets)[self.places]
        owners = np.repeat(self.places, counts)
        starts = (
            np.repeat(offsets[self.places] - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
            if len(counts)
            else counts
        )
        flat = shown[starts + np.arange(len(owners))]
        numbers, first = np.unique(flat, return_index=True)
        return dict(zip(numbers.tolist(), owners[first].tolist(), strict=True))

    def rows_with(self, media: set[int]) -> np.ndarray:
        """The places of rows that show one of the media."""
        shown, offsets = self.prepared.shown
        marked = np.concatenate([[0], np.cumsum(np.isin(shown, sorted(media)))])
        return self.places[marked[offsets[self.places + 1]] > marked[offsets[self.places]]]

    def name(self, place: int) -> Name:
        """What messages call a row."""
        one = np.array([place])
        return self.prepared.values("source", one)[0], self.prepared.values("row", one)[0]


def repeats(rows: PartRows) -> list[tuple[int, int]]:
    """(place, place of the earlier row that it repeats) of rows with equal text and images."""
    _, first, groups = np.unique(rows.keys, return_index=True, return_inverse=True)
    later = np.flatnonzero(first[groups] != np.arange(len(groups)))
    return [(int(rows.places[place]), int(rows.places[first[groups[place]]])) for place in later]


Place = tuple[PartRows, int]
"""A row by its place in a part."""


@dataclass(frozen=True)
class Leaks:
    """Rows of an evaluated part, by place, each with the training row that shares its text and images, or an image."""

    rows: dict[int, Place]
    images: dict[int, Place]
    looks: dict[int, Place]


def leaks(evaluated: Sequence[PartRows], trained: Sequence[PartRows]) -> list[Leaks]:
    """What each evaluated part has in common with all that is trained on; a row is in the first list that it belongs in."""
    images: dict[bytes, Place] = {}
    infos: dict[bytes, ImageInfo] = {}
    for part in trained:
        for number, place in part.first_rows.items():
            info = infos.setdefault(
                part.prepared.media_rows[number].info.sha256, part.prepared.media_rows[number].info
            )
            images.setdefault(info.sha256, (part, place))
    shown = [
        {number: part.prepared.media_rows[number].info for number in part.first_rows}
        for part in evaluated
    ]
    infos |= {
        info.sha256: info for own in shown for info in own.values() if info.sha256 not in images
    }
    # Trained images stand first, so that a group with one of them is named by it.
    looks = dict(zip(infos, look_alikes(list(infos.values())).tolist(), strict=True))
    known = list(images.values())
    found = []
    for part, own in zip(evaluated, shown, strict=True):
        whole = _equal_rows(part, trained)
        same = {
            number: images[info.sha256] for number, info in own.items() if info.sha256 in images
        }
        alike = {
            number: known[looks[info.sha256]]
            for number, info in own.items()
            if looks[info.sha256] < len(known)
        }
        shared = _rows_of(part, same, set(whole))
        found.append(Leaks(whole, shared, _rows_of(part, alike, set(whole) | set(shared))))
    return found


def _equal_rows(rows: PartRows, trained: Sequence[PartRows]) -> dict[int, Place]:
    found: dict[int, Place] = {}
    for part in trained:
        order = np.argsort(part.keys, kind="stable")
        known = part.keys[order]
        at = np.minimum(np.searchsorted(known, rows.keys), max(len(known) - 1, 0))
        hits = np.flatnonzero(known[at] == rows.keys) if len(known) else []
        for hit in hits:
            found.setdefault(int(rows.places[hit]), (part, int(part.places[order[at[hit]]])))
    return found


def _rows_of(rows: PartRows, media: dict[int, Place], told: set[int]) -> dict[int, Place]:
    """The rows that show the media and were not told of, each with the training row of the first of them."""
    if not media:
        return {}
    shown, offsets = rows.prepared.shown
    found: dict[int, Place] = {}
    for place in rows.rows_with(set(media)).tolist():
        if place not in told:
            number = next(
                number
                for number in shown[offsets[place] : offsets[place + 1]].tolist()
                if number in media
            )
            found[place] = media[number]
    return found
