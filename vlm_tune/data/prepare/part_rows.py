"""The rows of one part of prepared data, compared by hashes of their texts and images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vlm_tune.data.prepare.dataset import Prepared

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
