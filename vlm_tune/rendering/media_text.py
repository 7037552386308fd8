"""Counts of media in words: images, frames of videos, audio clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NOUNS = {"images": "image", "frames": "video frame", "clips": "audio clip"}
"""The noun of each of `MediaCounts`."""


def medium_noun(summary: Mapping[str, Any]) -> str:
    """The noun of what a summary's scores are about: image, video, or clip of audio."""
    return {"audio": "clip", "video": "video"}.get(str(summary.get("modality")), "image")


def medium_names(summaries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The `medium_noun`s of summaries, joined, and their plurals: what pages call the media."""
    nouns = list(dict.fromkeys(medium_noun(summary) for summary in summaries))
    return {"medium": " or ".join(nouns), "media": " or ".join(f"{noun}s" for noun in nouns)}


def counts_shown(counts: Sequence[Mapping[str, Any]]) -> list[str]:
    """The counts that are shown: those over 0 in one of the mappings, else that of images."""
    return [name for name in NOUNS if any(each.get(name) for each in counts)] or ["images"]


def media_text(counts: Mapping[str, Any]) -> str:
    """Counts of media in words, as in "1 image, 8 video frames"."""
    texts = []
    for name in counts_shown([counts]):
        number = counts.get(name, 0)
        texts.append(f"{number:,} {NOUNS[name]}{'' if number == 1 else 's'}")
    return ", ".join(texts)
