"""Places follow pixels: a spot in an image is where its move's map says."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_tune.config.data import Augment, RandAugment
from vlm_tune.data.affine import Affine
from vlm_tune.data.images.augment import draw_augmentation
from vlm_tune.data.images.decode import ImageProcessor
from vlm_tune.data.images.moves import (
    Crop,
    Flip,
    Move,
    Shift,
    Transpose,
    Warp,
    ZoomOut,
)
from vlm_tune.data.images.split import Idefics3Frames

SIDE = 64


def spot(x: float, y: float, height: int = SIDE, width: int = SIDE) -> torch.Tensor:
    """A smooth bright spot around a place on black."""
    down, right = np.mgrid[0:height, 0:width] + 0.5
    light = 255 * np.exp(-((down - y) ** 2 + (right - x) ** 2) / 18)
    return torch.from_numpy(np.stack([light] * 3).round().astype(np.uint8))


def together(places: list[Affine]) -> Affine:
    return reduce(Affine.then, places, IDENTITY)


def brightest(pixels: torch.Tensor) -> tuple[float, float]:
    """The centre of what is bright, in continuous pixels."""
    light = pixels[0].double()
    light = light * (light > 60)
    down, right = np.mgrid[0 : light.shape[0], 0 : light.shape[1]] + 0.5
    total = float(light.sum())
    across = float((light * torch.from_numpy(right)).sum()) / total
    return across, float((light * torch.from_numpy(down)).sum()) / total


@pytest.mark.parametrize(
    "move",
    [
        Crop(8, 12, 40, 48),
        ZoomOut(10, 4, 40, 50),
        Flip(),
        Transpose(),
        Shift(-5, 9),
        Warp(turn=25),
        Warp(shift=(0.1, -0.15)),
        Warp(shear=(0.2, 0.0)),
        Warp(shear=(0.0, -0.2)),
        Warp(10, (0.05, 0.1), (0.1, 0.1)),
    ],
)
@pytest.mark.parametrize("place", [(30.0, 30.0), (36.0, 26.0)])
def test_a_spot_goes_where_the_map_says(move: Move, place: tuple[float, float]) -> None:
    moved = brightest(move.pixels(spot(*place)))
    assert moved == pytest.approx(move.places(SIDE, SIDE).point(*place), abs=0.35)


@pytest.mark.parametrize("move", [Crop(4, 8, 30, 50), Flip(), Shift(3, -6), Warp(turn=-20)])
def test_maps_of_oblong_images(move: Move) -> None:
    moved = brightest(move.pixels(spot(40.0, 20.0, 48, 80)))
    assert moved == pytest.approx(move.places(48, 80).point(40.0, 20.0), abs=0.35)


IDENTITY = Affine.scale(1.0, 1.0)
EVERY: dict[str, Any] = {
    "crop": 0.8,
    "zoom_out": 0.8,
    "flip": 0.5,
    "transpose": 0.5,
    "shift": 0.08,
    "rotation": 20.0,
    "colour": 0.1,
    "hue": 0.05,
    "grey": 0.5,
    "rand_augment": RandAugment(ops=1, magnitude=4),
}


@pytest.mark.parametrize("key", range(12))
def test_a_whole_draw_moves_places_as_it_moves_pixels(key: int) -> None:
    augment = Augment(**{**EVERY, "rand_augment": None})
    draw = draw_augmentation(augment, (0, 0, key), SIDE, SIDE)
    moved = brightest(draw.pixels(spot(31.0, 34.0)))
    assert moved == pytest.approx(together(draw.places(SIDE, SIDE)).point(31.0, 34.0), abs=0.6)


def test_rand_augment_is_part_of_the_map_and_a_still_draw_is_not() -> None:
    augment = Augment(**EVERY)
    draws = [draw_augmentation(augment, (0, 0, key), SIDE, SIDE) for key in range(40)]
    moving = [draw for draw in draws if any(each.move for each in draw.operations)]
    assert 5 < len(moving) < 35
    for draw in moving:
        last = next(each.move for each in draw.operations if each.move)
        places = draw.places(SIDE, SIDE)
        assert len(places) == len(draw.moves) + 1
        assert np.array_equal(places[-1].matrix, last.places(SIDE, SIDE).matrix)
    assert all(draw.still().places(SIDE, SIDE) == [] for draw in draws)


@given(
    st.lists(st.floats(-3, 3), min_size=4, max_size=4),
    st.tuples(st.floats(-50, 50), st.floats(-50, 50)),
)
@settings(max_examples=60, deadline=None)
def test_an_inverse_leads_back(numbers: list[float], place: tuple[float, float]) -> None:
    a, b, c, d = numbers
    if abs(a * d - b * c) < 0.1:
        return
    affine = Affine.of((a, b, 7.0), (c, d, -3.0))
    assert affine.inverse().point(*affine.point(*place)) == pytest.approx(place, abs=1e-6)


@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
@pytest.mark.parametrize("size", [(96, 64), (64, 96), (64, 64), (200, 120), (75, 131)])
def test_a_spot_of_an_image_is_where_the_frame_shows_it(resize: Any, size: tuple[int, int]) -> None:
    from PIL import Image

    processor = ImageProcessor(48, resize, mean=(0.0, 0.0, 0.0))
    width, height = size
    place = (width * 0.48, height * 0.55)
    pixels = spot(*place, height, width).permute(1, 2, 0).numpy()
    # A spot that shrinks stays one: its centre is compared, not its size.
    shown = brightest(processor.pixels(Image.fromarray(pixels)))
    assert shown == pytest.approx(processor.places(width, height).point(*place), abs=0.5)


def test_a_split_shows_the_whole_image_in_its_frame() -> None:
    processor = ImageProcessor(32, "crop", split=Idefics3Frames(64))
    assert processor.places(100, 50).point(100, 50) == pytest.approx((32, 32))
