"""Counts of media: an image's tiles and a clip's windows count once, frames of videos by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.helpers.audio_samples import hearing_recipe, write_tone_rows
from tests.helpers.tiny_models import parsed
from vlm_tune.data.prepare.arrow_store import MediaRow
from vlm_tune.data.prepare.duplicates import ImageInfo
from vlm_tune.data.prepare.media_counts import MediaCounts
from vlm_tune.data.prepare.run import prepare, scratch_texts
from vlm_tune.data.types import Media, Tile
from vlm_tune.model.build import build_processor


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


def test_what_a_run_trains_on_is_counted_by_clips_and_not_by_windows(tmp_path: Path) -> None:
    """One of two clips has two windows."""
    recipe = parsed(hearing_recipe("causal", write_tone_rows(tmp_path), tmp_path / "run"))
    processor = build_processor(recipe, scratch_texts(recipe))
    prepared = prepare(recipe.data, recipe.data.train, processor, seed=0)
    assert len(prepared.media) == 3
    assert MediaCounts.of(prepared.used_media) == MediaCounts(images=0, frames=0, clips=2)


def test_frames_are_still_those_of_a_video_when_they_are_stored(
    tiny_recipe: Callable[..., str], color_rows: Path
) -> None:
    frames = [image.name for image in color_rows.parent.glob("*.png")]
    path = color_rows.parent / "videos.jsonl"
    path.write_text(json.dumps({"question": "what?", "answer": "colors", "video": frames}))
    recipe = parsed(tiny_recipe("causal"), data__train=[{"kind": "file", "path": str(path)}])
    processor = build_processor(recipe, scratch_texts(recipe))
    prepared = prepare(recipe.data, recipe.data.train, processor, seed=0)
    assert MediaCounts.of(prepared.used_media) == MediaCounts(images=0, frames=4, clips=0)
