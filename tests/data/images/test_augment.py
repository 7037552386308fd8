"""Augmentation is a function of its key and keeps shape and type.

Each change does what its name says.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional

from vlm_tune.config.data import Augment, RandAugment
from vlm_tune.data.images.augment import (
    OPERATIONS,
    draw_augmentation,
    draw_crop,
    draw_operations,
    draw_zoom_out,
)
from vlm_tune.data.images.moves import Warp

EVERY: dict[str, Any] = {
    "crop": 0.5,
    "zoom_out": 0.5,
    "flip": 0.5,
    "transpose": 0.5,
    "shift": 0.25,
    "rotation": 45.0,
    "colour": 0.4,
    "hue": 0.2,
    "grey": 0.5,
    "noise": 0.1,
    "rand_augment": RandAugment(ops=2, magnitude=15),
}


def augment_pixels(pixels: torch.Tensor, augment: Augment, key: tuple[int, ...]) -> torch.Tensor:
    return draw_augmentation(augment, key, *pixels.shape[-2:]).pixels(pixels)


def scene(height: int = 48, width: int = 48) -> torch.Tensor:
    """Smooth and coloured, different in every place: no change of it goes unseen."""
    down, right = np.mgrid[0:height, 0:width]
    channels = [down * 5, right * 5, 120 + 80 * np.sin(down / 5 + right / 7)]
    return torch.from_numpy(np.stack(channels).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("name", [*EVERY, "all"])
@pytest.mark.parametrize("size", [(48, 48), (40, 56)])
def test_each_change_is_a_function_of_its_key(name: str, size: tuple[int, int]) -> None:
    augment = Augment(**(EVERY if name == "all" else {name: EVERY[name]}))
    pixels = scene(*size)
    before = pixels.clone()
    keys = [(0, epoch, sample) for epoch in range(3) for sample in (0, 1, 2**32 - 1)]
    changed = [augment_pixels(pixels, augment, key) for key in keys]
    for key, one in zip(keys, changed, strict=True):
        assert one.shape == pixels.shape and one.dtype == torch.uint8
        assert torch.equal(one, augment_pixels(pixels, augment, key))
    assert torch.equal(pixels, before), "changed in place"
    distinct = len({one.contiguous().numpy().tobytes() for one in changed})
    assert distinct >= (
        1
        if name == "transpose" and size[0] != size[1]
        else 2
        if name in ("flip", "transpose", "grey")
        else 8
    )


def test_no_global_generator_is_read_or_moved() -> None:
    augment, pixels = Augment(**EVERY), scene()
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        states = (
            torch.get_rng_state(),
            np.random.get_state()[1].copy(),  # type: ignore[index,union-attr]
            random.getstate(),
        )
        runs.append([augment_pixels(pixels, augment, (0, 0, sample)) for sample in range(40)])
        assert torch.equal(states[0], torch.get_rng_state())
        assert np.array_equal(states[1], np.random.get_state()[1])  # type: ignore[index]
        assert states[2] == random.getstate()
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_defaults_change_nothing() -> None:
    pixels = scene(7, 9)
    assert torch.equal(augment_pixels(pixels, Augment(), (0, 0, 0)), pixels)


def test_flip_and_transpose() -> None:
    pixels = scene()
    assert torch.equal(augment_pixels(pixels, Augment(flip=1.0), (0, 0, 0)), pixels.flip(-1))
    assert torch.equal(
        augment_pixels(pixels, Augment(transpose=1.0), (0, 0, 0)), pixels.transpose(-1, -2)
    )
    oblong = scene(10, 20)
    assert torch.equal(augment_pixels(oblong, Augment(transpose=1.0), (0, 0, 0)), oblong)


@given(st.integers(1, 400), st.integers(1, 400), st.floats(0.01, 1), st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_a_crop_lies_inside_keeps_its_share_and_its_aspect(
    height: int, width: int, smallest: float, seed: int
) -> None:
    crop = draw_crop(np.random.default_rng(seed), height, width, smallest)
    top, left, high, wide = crop.top, crop.left, crop.height, crop.width
    assert (
        top >= 0
        and left >= 0
        and high >= 1
        and wide >= 1
        and top + high <= height
        and left + wide <= width
    )
    assert high * wide >= smallest * height * width * (1 - 1e-9)
    # A side is rounded up by less than a pixel.
    assert wide / width <= 4 / 3 * high / height + 1 / width + 1e-9
    assert high / height <= 4 / 3 * wide / width + 1 / height + 1e-9


def test_crops_reach_the_smallest_share_and_every_corner() -> None:
    boxes = [draw_crop(np.random.default_rng(seed), 100, 100, 0.25) for seed in range(400)]
    shares = [crop.height * crop.width / 1e4 for crop in boxes]
    assert min(shares) < 0.3 and max(shares) > 0.95
    assert {crop.top == 0 for crop in boxes} == {True, False} and max(
        crop.top + crop.height for crop in boxes
    ) == 100


def test_a_zoom_out_shows_the_whole_image_on_the_colour_of_its_border() -> None:
    pixels = torch.full((3, 60, 90), 230, dtype=torch.uint8)
    pixels[:, 10:50, 15:75] = torch.tensor([200, 20, 90], dtype=torch.uint8)[:, None, None]
    sides = []
    for seed in range(100):
        zoomed = draw_zoom_out(np.random.default_rng(seed), 60, 90, 0.5).pixels(pixels)
        inside = (zoomed[1] < 125).nonzero()
        height, width = (
            (inside.amax(0) - inside.amin(0) + 1).float() / torch.tensor([40, 60])
        ).tolist()
        sides.append((height, width))
        assert (zoomed[:, [0, 0, -1, -1], [0, -1, 0, -1]] == 230).all()
        assert zoomed.shape == pixels.shape and 20 <= int(zoomed.min()) <= 25
    assert min(min(each) for each in sides) > 0.5 * 3 / 4 - 0.05
    assert max(max(each) for each in sides) < 1.05
    assert {round(min(each), 1) for each in sides} >= {0.4, 0.5, 0.6, 0.7, 0.8, 0.9}
    ratios = [height / width for height, width in sides]
    assert 0.7 < min(ratios) < 0.85 and 1.2 < max(ratios) < 1.42


def test_grey_leaves_brightness() -> None:
    pixels = scene()
    grey = augment_pixels(pixels, Augment(grey=1.0), (0, 0, 0))
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[1], grey[2])
    assert torch.equal(grey, functional.rgb_to_grayscale(pixels, num_output_channels=3))
    shown = [augment_pixels(pixels, Augment(grey=0.25), (0, 0, key)) for key in range(200)]
    assert 30 <= sum(torch.equal(one, grey) for one in shown) <= 70


def test_a_turn_is_torchvisions_inside_and_the_edge_outside() -> None:
    pixels = scene(60, 80)
    for degrees in (-30.0, 12.0, 90.0):
        theirs = functional.rotate(
            pixels, degrees, interpolation=functional.InterpolationMode.BILINEAR
        ).int()
        outside = functional.pad(
            1 - functional.rotate(torch.ones_like(pixels), degrees)[:1], [1], fill=1
        )
        # Next to what is outside, theirs mixes in black.
        inside = torch.nn.functional.max_pool2d(outside.float(), 3, 1)[0] == 0
        assert inside.sum() > 1000
        ours = Warp(turn=degrees).pixels(pixels).int()
        assert (ours - theirs)[:, inside].abs().max() <= 1, degrees
    plain = torch.full((3, 20, 20), 77, dtype=torch.uint8)
    assert torch.equal(Warp(45, (0.4, -0.4), (0.3, 0.1)).pixels(plain), plain)


def test_a_shift_moves_right_and_down_and_a_shear_slants() -> None:
    pixels = scene(40, 80)
    moved = Warp(shift=(0.25, 0.5)).pixels(pixels)
    assert torch.equal(moved[:, 20:, 20:], pixels[:, :20, :60])
    assert torch.equal(moved[:, 0, 20:], pixels[:, 0, :60]), "the edge goes on"
    slanted = Warp(shear=(0.5, 0.0)).pixels(pixels)
    assert (
        abs(int(slanted[1, 30, 20]) - int(pixels[1, 30, 25])) <= 2
        and abs(int(slanted[1, 10, 30]) - int(pixels[1, 10, 25])) <= 2
    )


def test_colour_noise_and_hue_stay_within_what_was_asked() -> None:
    grey = torch.full((3, 64, 64), 100, dtype=torch.uint8)
    levels = [
        float(augment_pixels(grey, Augment(colour=0.2), (0, 0, key)).float().mean())
        for key in range(100)
    ]
    assert 78 <= min(levels) < 85 and 115 < max(levels) <= 121
    noisy = augment_pixels(grey, Augment(noise=0.05), (0, 0, 0)).float()
    assert float(noisy.std()) == pytest.approx(0.05 * 255, rel=0.05) and float(
        noisy.mean()
    ) == pytest.approx(100, abs=0.5)
    white = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    assert augment_pixels(white, Augment(noise=0.5), (0, 0, 0)).min() < 128, (
        "clipped, not wrapped round"
    )
    red = torch.zeros(3, 4, 4, dtype=torch.uint8)
    red[0] = 255
    for key in range(50):
        shifted = augment_pixels(red, Augment(hue=0.1), (0, 0, key))
        # A tenth of the circle is 36 degrees: red turns at most to 0.6 of yellow or of magenta.
        assert shifted[0].min() == 255 and shifted[1:].max() <= 0.6 * 255 + 2


class Scripted:
    """A generator that gives one operation and one sign."""

    def __init__(self, operation: str, *, negative: bool) -> None:
        self.operation, self.value = OPERATIONS.index(operation), 0.9 if negative else 0.1

    def integers(self, *_: int) -> list[int]:
        return [self.operation]

    def random(self) -> float:
        return self.value


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_of_rand_augment_acts_and_grows_with_its_magnitude(operation: str) -> None:
    pixels = scene()

    def apart(magnitude: int, negative: bool = False) -> float:
        drawn = draw_operations(
            RandAugment(ops=1, magnitude=magnitude), Scripted(operation, negative=negative)
        )  # type: ignore[arg-type]
        assert [each.name for each in drawn] == [operation]
        changed = drawn[0].pixels(pixels)
        assert changed.shape == pixels.shape and changed.dtype == torch.uint8
        return float((changed.float() - pixels.float()).abs().mean())

    if operation == "identity":
        assert apart(30) == 0
    elif operation in ("autocontrast", "equalize"):
        assert apart(0) == apart(30) > 0
    else:
        assert apart(0) < 1.5 and apart(30) > apart(5)
        if operation not in ("posterize", "solarize"):
            assert apart(30, negative=True) > apart(5, negative=True)


def test_rand_augment_draws_every_operation_with_either_sign() -> None:
    pixels, settings = scene(), RandAugment(ops=1, magnitude=9)

    def changed(random: Any) -> bytes:
        (operation,) = draw_operations(settings, random)
        return operation.pixels(pixels).numpy().tobytes()

    every = {
        changed(Scripted(operation, negative=negative))
        for operation in OPERATIONS
        for negative in (False, True)
    }
    assert len(every) == 9 * 2 + 5
    assert {changed(np.random.default_rng(seed)) for seed in range(600)} == every
