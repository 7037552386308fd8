"""Repeated rows within a part, and rows and images of one part that another part shows too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vlm_tune.data.prepare.dataset import Prepared
from vlm_tune.data.prepare.duplicates import ImageInfo, look_alikes

MIX = np.uint64(0x9E3779B97F4A7C15)
"""An odd multiplier that makes a row's hash depend on the order of its images."""

Name = tuple[str, int]
"""Source and row number."""


@dataclass(frozen=True)
class PartRows:
    """The usable rows of one part, by their places in the prepared data set."""

    prepared: Prepared
    places: np.ndarray

    @cached_property
    def keys(self) -> np.ndarray:
        """Hashes as uint64[rows], equal for rows of equal text and equal bytes of images.

        Texts are compared without case and white space.
        """
        return self._mixed("text")

    @property
    def contents(self) -> np.ndarray:
        """Hashes as uint64[rows], equal for rows of equal exact texts and equal bytes of images.

        For rows that can't be read they are hashes of the raw content.
        """
        return self._mixed("digest")

    def _mixed(self, column: str) -> np.ndarray:
        """Mixes a column's hashes with those of each row's images."""
        hashes = self.prepared.column(column)[self.places].astype(np.uint64)
        shown, offsets = self.prepared.shown
        digests = np.array(
            [int.from_bytes(row.info.sha256[:8], "little") for row in self.prepared.media_rows],
            dtype=np.uint64,
        )
        starts = offsets[self.places]
        counts = np.diff(offsets)[self.places]
        for number in range(int(counts.max(initial=0))):
            has = counts > number
            hashes[has] = hashes[has] * MIX + digests[shown[starts[has] + number]]
        return hashes

    @cached_property
    def first_rows(self) -> dict[int, int]:
        """The place of the first row that shows each medium, by the medium's number."""
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
        """Returns the places of rows that show one of the media, given by number."""
        shown, offsets = self.prepared.shown
        marked = np.concatenate([[0], np.cumsum(np.isin(shown, sorted(media)))])
        return self.places[marked[offsets[self.places + 1]] > marked[offsets[self.places]]]

    def name(self, place: int) -> Name:
        """Returns the source and row number by which messages name the row at `place`."""
        one = np.array([place])
        return self.prepared.values("source", one)[0], self.prepared.values("row", one)[0]


def repeats(rows: PartRows) -> list[tuple[int, int]]:
    """Finds rows that repeat the text and images of an earlier one, as (place, earlier place)."""
    _, first, groups = np.unique(rows.keys, return_index=True, return_inverse=True)
    later = np.flatnonzero(first[groups] != np.arange(len(groups)))
    return [(int(rows.places[place]), int(rows.places[first[groups[place]]])) for place in later]


Place = tuple[PartRows, int]
"""A row by its place in a part."""


@dataclass(frozen=True)
class Leaks:
    """Rows of an evaluated part, by place, that share something with a training row.

    `rows` share text and images, `images` share an image, and `looks` have one that looks alike.
    """

    rows: dict[int, Place]
    images: dict[int, Place]
    looks: dict[int, Place]


def leaks(evaluated: Sequence[PartRows], trained: Sequence[PartRows]) -> list[Leaks]:
    """Finds what each evaluated part has in common with all rows that are trained on.

    A row is only in the first field of `Leaks` that it belongs in.
    """
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
        info.sha256: info for media in shown for info in media.values() if info.sha256 not in images
    }
    # Trained images come first, so that a group that has one is named by it.
    looks = dict(zip(infos, look_alikes(list(infos.values())).tolist(), strict=True))
    known = list(images.values())
    all_leaks = []
    for part, media in zip(evaluated, shown, strict=True):
        whole = _equal_rows(part, trained)
        same = {
            number: images[info.sha256] for number, info in media.items() if info.sha256 in images
        }
        alike = {
            number: known[looks[info.sha256]]
            for number, info in media.items()
            if looks[info.sha256] < len(known)
        }
        shared = _rows_of(part, same, set(whole))
        all_leaks.append(Leaks(whole, shared, _rows_of(part, alike, set(whole) | set(shared))))
    return all_leaks


def _equal_rows(rows: PartRows, trained: Sequence[PartRows]) -> dict[int, Place]:
    """Finds the rows with the text and images of a training row, each with the first such row."""
    matches: dict[int, Place] = {}
    for part in trained:
        order = np.argsort(part.keys, kind="stable")
        known = part.keys[order]
        at = np.minimum(np.searchsorted(known, rows.keys), max(len(known) - 1, 0))
        hits = np.flatnonzero(known[at] == rows.keys) if len(known) else []
        for hit in hits:
            matches.setdefault(int(rows.places[hit]), (part, int(part.places[order[at[hit]]])))
    return matches


def _rows_of(rows: PartRows, media: dict[int, Place], reported: set[int]) -> dict[int, Place]:
    """Finds rows that show the media, except those in `reported`.

    Each comes with the training row of the first of the media that it shows.
    """
    if not media:
        return {}
    shown, offsets = rows.prepared.shown
    matches: dict[int, Place] = {}
    for place in rows.rows_with(set(media)).tolist():
        if place not in reported:
            number = next(
                number
                for number in shown[offsets[place] : offsets[place + 1]].tolist()
                if number in media
            )
            matches[place] = media[number]
    return matches
