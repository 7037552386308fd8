"""Repeated rows within a part, and rows and images of one part that another part shows too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm_tune.data.prepare.duplicates import ImageInfo, look_alikes
from vlm_tune.data.prepare.part_rows import PartRows


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
