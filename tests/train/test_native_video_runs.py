"""Runs of native models on videos: checked, shown, trained, exported, with the recipe's limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoProcessor

from tests.helpers.native_videos import FRAMES, ROWS, video_recipe
from tests.helpers.tiny_models import LORA_TUNE, built, parsed, rows_of, with_tune
from vlm_tune.api import sft
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.images.native import NativeImages
from vlm_tune.data.prepare.media_counts import MediaCounts
from vlm_tune.data.prepare.run import prepare
from vlm_tune.data.types import Media, Video
from vlm_tune.data_check.check import check
from vlm_tune.errors import DataError, ModelError
from vlm_tune.exporting import export
from vlm_tune.model.build import build_processor
from vlm_tune.rendering.samples import sample_tokens


def recipe_of(folder: Path, kind: str, extra: str = "", **changes: Any) -> Recipe:
    settings: dict[str, Any] = {"train__batch_size": 2, "data__group": "image"} | changes
    return parsed(with_tune(video_recipe(folder, kind, extra), LORA_TUNE), **settings)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_a_run_on_videos_is_exported_with_its_limits(kind: str, tmp_path: Path) -> None:
    """Verified on rows with videos, whose tensors the exported processor must give too."""
    recipe = recipe_of(tmp_path, kind, ", video_max_pixels: 16384")
    sft(recipe)
    report = export(tmp_path / "run", tmp_path / "out", dtype="fp32")
    assert report.difference is not None and report.difference <= 1e-4
    assert report.same_text and report.rows == 4
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "out")
    videos = processor.video_processor
    assert videos.size.longest_edge == 16384
    assert (videos.num_frames, videos.fps, videos.cap_pixels_per_frame) == (FRAMES, None, False)


def test_a_chat_format_of_ours_writes_videos_too(tmp_path: Path) -> None:
    """The exported chat template writes them as the checkpoint's own does."""
    recipe = recipe_of(tmp_path, "qwen3_vl", data__template="chatml", data__system="Be brief.")
    sft(recipe)
    report = export(tmp_path / "run", tmp_path / "out", dtype="fp32")
    assert report.same_text and report.rows == 4


def test_lengths_and_slots_of_videos_are_known_before_a_run(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "qwen3_vl", data__group="none")
    # The validation rows of the recipe are its training rows.
    assert set(check(recipe).error_counts) == {"leak_row"}
    # Seven frames of two clips and an image, not their four joint items.
    prepared = prepare(
        recipe.data, recipe.data.train, build_processor(recipe, []), seed=recipe.seed
    )
    counts = MediaCounts.of(prepared.media_rows)
    assert (counts.images, counts.frames, counts.clips) == (1, 7, 0)
    shown = sample_tokens(recipe, len(ROWS))
    frames = [sum(token["kind"] == "frame" for token in each["tokens"]) for each in shown]
    assert frames[0] > 2 * FRAMES and frames[0] == frames[1] == frames[2]


@pytest.mark.parametrize("group", ["none", "image"])
def test_prepared_videos_are_the_rows_own(group: str, tmp_path: Path) -> None:
    """Frames, places, times and rate are stored, also of frames that come as bytes."""
    recipe = recipe_of(tmp_path, "qwen2_5_vl", data__group=group)
    data = recipe.data
    processor = build_processor(recipe, [])
    prepared = prepare(data, data.train, processor, seed=recipe.seed)
    stored = {item.source for item in prepared.media if isinstance(item.source, Video)}
    given = {
        item.source
        for row in rows_of(recipe)
        for item in row.items
        if isinstance(item.source, Video)
    }
    assert stored == given and len(stored) == 2
    path = tmp_path / "bytes.jsonl"
    encoded = [_base64(tmp_path / "quick" / f"{number}.png") for number in range(3)]
    row = {"video": encoded, "question": "What?", "answer": "quick"}
    path.write_text("".join(json.dumps(row | {"id": str(n)}) + "\n" for n in range(2)))
    source = data.train[0].model_copy(update={"path": str(path)})
    prepared = prepare(data, [source], processor, seed=recipe.seed)
    (video,) = [item for item in prepared.media if item.modality == "video"]
    assert [frame.read() for frame in video.pictures] == [
        (tmp_path / "quick" / f"{number}.png").read_bytes() for number in range(3)
    ]
    (row_again, _) = list(prepared.conversations(np.arange(2)))
    assert row_again.items[0].source == video.source


def _base64(path: Path) -> str:
    import base64

    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def test_frames_of_several_sizes_are_no_video(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "qwen3_vl")
    images = build_processor(recipe, []).images
    assert isinstance(images, NativeImages)
    frames = (Media(tmp_path / "slow" / "0.png"), Media(tmp_path / "quick" / "0.png"))
    with pytest.raises(DataError, match="the frames of a video have one size, these have 30x52, "):
        images.segments(Media(Video(frames, (0, 1), 2), "video"))
    with pytest.raises(DataError, match="the model's own video processor refuses it: t:1 must be"):
        images.segments(Media(Video(frames[:1], (0,), 1), "video"))


def test_bounds_of_videos_are_refused_where_there_are_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="video_min_pixels, video_max_pixels: a Gemma4VideoProc"):
        built(recipe_of(tmp_path, "gemma4", ", video_max_pixels: 4096", data__group="none"))
