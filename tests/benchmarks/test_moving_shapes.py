"""The data set of the video recipes: what it holds, and that it is the same anew."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from benchmarks.moving_shapes import (
    COLORS,
    DIRECTIONS,
    FRAMES,
    SHAPES,
    SIDE,
    Clip,
    Frame,
    Thing,
    build,
    clip_captions,
    drawn_clip,
    frame_captions,
    picture,
    questions,
)
from tests.helpers.row_samples import file_source, good, read

BACKGROUND = (240, 240, 240)


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    draw = random.Random(0)
    return [drawn_clip(draw) for _ in range(200)]


def test_clips_move_and_grow_as_they_say(clips: list[Clip]) -> None:
    for clip in clips:
        first, last = clip.frames[0], clip.frames[-1]
        across, down = DIRECTIONS[clip.direction]
        assert (np.sign(last.x - first.x), np.sign(last.y - first.y)) == (across, down)
        assert (last.radius > first.radius) == clip.grows
        assert list(dict.fromkeys(frame.thing for frame in clip.frames)) == clip.things
        assert len({thing.shape for thing in clip.things}) == len(clip.things)
    assert {clip.direction for clip in clips} == set(DIRECTIONS)
    assert {len(clip.things) for clip in clips} == {1, 2, 3}


def test_one_frame_alone_says_little_of_the_direction(clips: list[Clip]) -> None:
    """The best guess from where the second frame's shape is."""
    pairs = [(clip.direction, clip.frames[1]) for clip in clips]
    across = [(frame.x, name) for name, frame in pairs if name in ("left", "right")]
    right = [(x < SIDE / 2) == (name == "right") for x, name in across]
    assert len(right) > 50 and sum(right) / len(right) < 0.8


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_seen_whole_in_its_color(shape: str) -> None:
    pixels = np.asarray(picture(Frame(Thing("red", shape), 20.0, 40.0, 10.0), BACKGROUND))
    red = (pixels == COLORS["red"]).all(-1)
    down, across = np.nonzero(red)
    assert pixels.shape == (SIDE, SIDE, 3) and red[40, 20]
    assert 9 <= across.min() <= 13 and 27 <= across.max() <= 30
    assert 29 <= down.min() <= 33 and 46 <= down.max() <= 50


def test_questions_and_captions_have_their_answers() -> None:
    things = [Thing("red", "circle"), Thing("blue", "square")]
    frames = [Frame(things[number > 0], 12.0 + 10 * number, 30.0, 12.0) for number in range(FRAMES)]
    clip = Clip(things, "right", False, frames)
    answers = {}
    for seed in range(8):
        answers |= {
            question: answer for question, answer, _ in questions(clip, random.Random(seed))
        }
    assert answers == {
        "which shape comes first?": "circle",
        "which color comes last?": "blue",
        "what comes after the circle?": "square",
        "what comes after the square?": "nothing",
        "how many different shapes appear?": "2",
        "in which direction do they move?": "right",
        "do they grow or shrink?": "shrink",
    }
    captions = ["a circle, then a square", "moving right and shrinking"]
    assert [caption for caption, _ in clip_captions(clip)] == captions
    assert [caption for caption, _ in frame_captions(frames[0])] == [
        "a red shape",
        "a circle",
        "a large shape",
        "at the left",
        "in the middle",
    ]


def test_clips_and_their_rows_are_written_anew_alike(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        build(tmp_path / folder, {"train": 3, "test": 2})
    source = file_source(tmp_path / "one" / "train.jsonl", video_frames=FRAMES, video_fps=2)
    rows = good(read(source))
    assert len(rows) == 18 and all(len(row.media) == FRAMES for row in rows)
    matched = tmp_path / "one" / "match-test.jsonl"
    assert len(good(read(file_source(matched, form="match", video_frames=FRAMES)))) == 4
    assert len(good(read(file_source(tmp_path / "one" / "frames-train.jsonl")))) == 60
    for path in (tmp_path / "one").rglob("*.*"):
        assert (
            path.read_bytes()
            == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
        )
