"""The media of rows, counted as what a reader of the data knows them as."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from vlm_tune.data.prepare.arrow_store import MediaRow


@dataclass(frozen=True)
class MediaCounts:
    """Distinct images, frames of videos, and audio clips.

    Tiles of an image and windows of a clip count once, as the whole.
    """

    images: int
    frames: int
    clips: int

    @classmethod
    def of(cls, rows: Iterable[MediaRow]) -> Self:
        """Counts media items by their content."""
        distinct = {
            row.info.sha256: row.media for row in rows if row.media.modality != "video"
        }.values()
        clips = sum(media.modality == "audio" for media in distinct)
        frames = sum(media.of_video for media in distinct)
        return cls(len(distinct) - frames - clips, frames, clips)
