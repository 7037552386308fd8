"""Boxes and points are drawn on a sample's thumbnail, scaled with it."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image, ImageColor

from vlm_tune.data.types import Media
from vlm_tune.rendering.page import GREEN, RED, THUMBNAIL, Thumbnail, regions_drawn, thumbnail


def drawn(size: tuple[int, int], expected: str, answer: str) -> np.ndarray:
    stream = io.BytesIO()
    Image.new("RGB", size, (255, 255, 255)).save(stream, "PNG")
    shown = thumbnail(Media(stream.getvalue()), regions_drawn(list(size), expected, [answer]))
    assert isinstance(shown, Thumbnail)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(shown.png))).convert("RGB"))


def places(pixels: np.ndarray, colour: str) -> list[tuple[int, int, int, int]]:
    """The box around the pixels of a colour."""
    down, across = np.nonzero((pixels == ImageColor.getrgb(colour)).all(-1))
    if not len(down):
        return []
    return [(int(across.min()), int(down.min()), int(across.max()), int(down.max()))]


def test_boxes_are_drawn_where_they_are() -> None:
    pixels = drawn((2 * THUMBNAIL, THUMBNAIL), "[40, 20, 100, 80]", "it is at [200, 10, 300, 90].")
    assert places(pixels, GREEN) == [(20, 10, 50, 40)]
    assert places(pixels, RED) == [(100, 5, 150, 45)]


def test_points_are_dots_and_texts_without_regions_draw_nothing() -> None:
    pixels = drawn((100, 100), "[50, 60]", "nowhere")
    assert places(pixels, GREEN) == [(48, 58, 52, 62)] and not places(pixels, RED)
    assert regions_drawn(None, "[1, 2, 3, 4]", ["[1, 2, 3, 4]"]) == []
    assert regions_drawn([9, 9], "[1, 2, 3, 4]", [None]) == [("[1, 2, 3, 4]", GREEN)]
