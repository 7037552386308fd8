"""Counts of media: an image's tiles and a clip's windows count once, frames of videos by name."""

from __future__ import annotations

from pathlib import Path

from vlm_tune.data.prepare.arrow_store import MediaRow
from vlm_tune.data.prepare.duplicates import ImageInfo
from vlm_tune.data.prepare.media_counts import MediaCounts
from vlm_tune.data.types import Media, Tile


def stored(name: str, **about: object) -> MediaRow:
    """A row of the media table."""
    info = ImageInfo(sha256=name.encode(), width=8, height=8, format="PNG", dhash=0, thumbnail=b"")
    return MediaRow(Media(Path(name), **about), info)  # type: ignore[arg-type]


def test_a_whole_counts_once_however_many_parts_the_model_takes() -> None:
    tiles = [stored("photo.png", tile=Tile(column, 0, 2, 1)) for column in range(2)]
    windows = [stored("a.wav", modality="audio", tile=Tile(n, 0, 3, 1)) for n in range(3)]
    frames = [stored(f"{n}.png", of_video=True) for n in range(4)]
    rows = [stored("photo.png"), *tiles, *windows, *frames]
    assert MediaCounts.of(rows) == MediaCounts(images=1, frames=4, clips=1)
    assert MediaCounts.of([]) == MediaCounts(0, 0, 0)
