"""Rows with videos, for tiny native models that take them in a form of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.helpers.native_models import FAMILIES, Kind, save_native, with_native
from tests.helpers.tiny_recipes import tiny_text

VIDEO_KINDS: list[Kind] = [
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    *(kind for kind in ("qwen3_5", "gemma4") if kind in FAMILIES),
]
"""Models with a form of their own for videos."""
FPS = 4.0
"""Frames per second of the clips."""
FRAMES = 4
"""Frames that are chosen of a clip, if it has as many."""
CLIPS = {"slow": (9, (60, 40)), "quick": (3, (30, 52))}
"""Number and size of the frames of each clip."""
ROWS: list[tuple[dict[str, list[str]], str, str]] = [
    ({"videos": ["slow"]}, "<video>What happens?", "it moves on"),
    ({"videos": ["slow"]}, "<video>Where to?", "left"),
    ({"videos": ["slow"]}, "<video>Fast?", "no"),
    (
        {"videos": ["quick"], "images": ["wide"]},
        "See <image> and then <video>: the same?",
        "no, it is quick",
    ),
    ({"videos": ["quick"], "images": ["wide"]}, "See <image> and then <video>: hot?", "no"),
    ({"videos": ["quick", "slow"]}, "<video> or <video>?", "both of them"),
    ({"images": ["wide"]}, "<image>What is it?", "a wide image"),
    ({}, "Only words here?", "yes"),
]


def write_clips(folder: Path) -> None:
    """Writes the clips as folders of frames, and an image."""
    for seed, (name, (count, size)) in enumerate(CLIPS.items()):
        (folder / name).mkdir()
        for number in range(count):
            _random(seed * 100 + number, size).save(folder / name / f"{number}.png")
    _random(99, (60, 21)).save(folder / "wide.png")


def _random(seed: int, size: tuple[int, int]) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), np.uint8))


def write_video_rows(path: Path) -> None:
    """Rows with videos, with images, with both, and with neither."""
    write_clips(path.parent)
    with path.open("w") as file:
        for media, question, answer in ROWS:
            named: dict[str, Any] = {
                kind: [f"{name}.png" if kind == "images" else name for name in names]
                for kind, names in media.items()
            }
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": turns, **named}) + "\n")


def video_recipe(folder: Path, kind: Kind, extra: str = "") -> str:
    """A recipe of a tiny native model in `folder`, which this writes with rows that have videos.

    `extra` are further keys of the model.
    """
    write_video_rows(folder / "rows.jsonl")
    save_native(folder / "vlm", kind)
    text = tiny_text("causal", folder / "rows.jsonl", folder / "run")
    text = text.replace("rows.jsonl}", f"rows.jsonl, video_fps: {FPS}, video_frames: {FRAMES}}}")
    return with_native(text.replace("max_length: 128", "max_length: 1024"), folder / "vlm", extra)
