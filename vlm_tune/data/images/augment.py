"""Image augmentations; all random numbers come from the generator passed in, never a global one.

They are drawn first and applied afterwards, so that places in an image can follow its pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlm_tune.config.data import Augment, RandAugment
from vlm_tune.data.affine import Affine
from vlm_tune.data.images.moves import (
    Crop,
    Flip,
    Move,
    Shift,
    Transpose,
    Warp,
    ZoomOut,
)

if TYPE_CHECKING:
    import torch

STRONGEST = 30
"""RandAugment's largest magnitude."""
OPERATIONS = (
    *(
        "identity",
        "shear_x",
        "shear_y",
        "shift_x",
        "shift_y",
        "turn",
        "brightness",
        "saturation",
        "contrast",
        "sharpness",
    ),
    *("posterize", "solarize", "autocontrast", "equalize"),
)
"""RandAugment's operations."""
ASPECT = 4 / 3
"""The largest ratio by which a random crop stretches one side against the other."""


def draw_crop(random: np.random.Generator, height: int, width: int, smallest: float) -> Crop:
    """A random crop of at least the share `smallest` of the area."""
    share = random.uniform(smallest, 1)
    # A larger stretch than 1 / share would need more than a whole side.
    most = math.log(min(ASPECT, 1 / share))
    stretch = math.exp(random.uniform(-most, most))
    high = min(math.ceil(height * math.sqrt(share / stretch)), height)
    wide = min(math.ceil(width * math.sqrt(share * stretch)), width)
    top = int(random.integers(0, height - high + 1))
    left = int(random.integers(0, width - wide + 1))
    return Crop(top, left, high, wide)


def draw_zoom_out(random: np.random.Generator, height: int, width: int, smallest: float) -> ZoomOut:
    """A random part of the frame to shrink to, at a random place.

    `smallest` is the smallest share of the sides; one side may be up to `ASPECT` times shorter.
    """
    share = random.uniform(smallest, 1)
    stretch = math.exp(random.uniform(-math.log(ASPECT), math.log(ASPECT)))
    high = max(round(height * share * min(stretch, 1)), 1)
    wide = max(round(width * share * min(1 / stretch, 1)), 1)
    top = int(random.integers(0, height - high + 1))
    left = int(random.integers(0, width - wide + 1))
    return ZoomOut(top, left, high, wide)


def moves_things(augment: Augment) -> bool:
    """Whether an augmentation may move what an image shows."""
    sides = augment.crop < 1 or augment.zoom_out < 1 or augment.shift > 0 or augment.rotation > 0
    mirrors = augment.flip > 0 or augment.transpose > 0
    return sides or mirrors or augment.rand_augment is not None


def draw_moves(
    augment: Augment, random: np.random.Generator, height: int, width: int
) -> list[Move]:
    """The moves of an image by all settings but `rand_augment`, in their order."""
    moves: list[Move] = []
    if augment.crop < 1:
        moves.append(draw_crop(random, height, width, augment.crop))
    if augment.zoom_out < 1:
        moves.append(draw_zoom_out(random, height, width, augment.zoom_out))
    if random.random() < augment.flip:
        moves.append(Flip())
    if random.random() < augment.transpose and height == width:
        moves.append(Transpose())
    if augment.shift:
        most = round(augment.shift * min(height, width))
        down, right = (int(value) for value in random.integers(-most, most + 1, 2))
        moves.append(Shift(down, right))
    if augment.rotation:
        moves.append(Warp(turn=random.uniform(-augment.rotation, augment.rotation)))
    return moves


@dataclass(frozen=True)
class Colours:
    """Changes of an image's colours.

    Attributes:
        factors: of brightness, contrast and saturation.
        hue: a turn, as a share of the circle.
        grey: whether the colours are taken away.
    """

    factors: tuple[float, float, float] | None = None
    hue: float | None = None
    grey: bool = False

    @classmethod
    def draw(cls, augment: Augment, random: np.random.Generator) -> Colours:
        """Random changes."""
        factors = None
        if augment.colour:
            brightness, contrast, saturation = random.uniform(
                1 - augment.colour, 1 + augment.colour, 3
            ).tolist()
            factors = (brightness, contrast, saturation)
        hue = random.uniform(-augment.hue, augment.hue) if augment.hue else None
        return cls(factors, hue, bool(augment.grey and random.random() < augment.grey))

    def pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Changes uint8[3, H, W]."""
        from torchvision.transforms.v2 import functional

        if self.factors is not None:
            brightness, contrast, saturation = self.factors
            pixels = functional.adjust_brightness(pixels, brightness)
            pixels = functional.adjust_contrast(pixels, contrast)
            pixels = functional.adjust_saturation(pixels, saturation)
        if self.hue is not None:
            pixels = functional.adjust_hue(pixels, self.hue)
        if self.grey:
            pixels = functional.rgb_to_grayscale(pixels, num_output_channels=3)
        return pixels


@dataclass(frozen=True)
class Operation:
    """One of RandAugment's operations; `strength` is from -1 to 1."""

    name: str
    strength: float

    @property
    def move(self) -> Move | None:
        """The operation as a move; None if it leaves things where they are."""
        match self.name:
            case "shear_x":
                return Warp(shear=(0.3 * self.strength, 0.0))
            case "shear_y":
                return Warp(shear=(0.0, 0.3 * self.strength))
            case "shift_x":
                return Warp(shift=(150 / 331 * self.strength, 0.0))
            case "shift_y":
                return Warp(shift=(0.0, 150 / 331 * self.strength))
            case "turn":
                return Warp(turn=30 * self.strength)
        return None

    def pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Changes uint8[3, H, W]."""
        from torchvision.transforms.v2 import functional as f

        if self.move is not None:
            return self.move.pixels(pixels)
        match self.name:
            case "brightness":
                pixels = f.adjust_brightness(pixels, 1 + 0.9 * self.strength)
            case "saturation":
                pixels = f.adjust_saturation(pixels, 1 + 0.9 * self.strength)
            case "contrast":
                pixels = f.adjust_contrast(pixels, 1 + 0.9 * self.strength)
            case "sharpness":
                pixels = f.adjust_sharpness(pixels, 1 + 0.9 * self.strength)
            case "posterize":
                pixels = f.posterize(pixels, 8 - round(4 * abs(self.strength)))
            case "solarize":
                pixels = f.solarize(pixels, 255 * (1 - abs(self.strength)))
            case "autocontrast":
                pixels = f.autocontrast(pixels)
            case "equalize":
                pixels = f.equalize(pixels)
        return pixels


def draw_operations(settings: RandAugment, random: np.random.Generator) -> list[Operation]:
    """Operations of RandAugment (https://arxiv.org/abs/1909.13719), drawn uniformly.

    They have torchvision's list and strengths. Unlike torchvision, which fills with black, pixels
    moved in from outside the image are those of its edge.
    """
    strength = settings.magnitude / STRONGEST
    return [
        Operation(OPERATIONS[number], strength if random.random() < 0.5 else -strength)
        for number in random.integers(0, len(OPERATIONS), settings.ops)
    ]


@dataclass(frozen=True)
class Draw:
    """One draw of an augmentation: what it does to each image of a sample.

    `random` draws the noise.
    """

    moves: Sequence[Move]
    colours: Colours
    operations: Sequence[Operation]
    noise: float
    random: np.random.Generator

    def still(self) -> Draw:
        """The draw without what moves things."""
        others = [each for each in self.operations if each.move is None]
        return Draw((), self.colours, others, self.noise, self.random)

    def pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Changes uint8[3, H, W]."""
        for change in (*self.moves, self.colours, *self.operations):
            pixels = change.pixels(pixels)
        return noisy(pixels, self.noise, self.random) if self.noise else pixels

    def places(self, height: int, width: int) -> list[Affine]:
        """Where the places of an image of this size go, move by move.

        What a move puts outside of the frame is gone, also where a later one shows more around it.
        """
        moves = [*self.moves, *(each.move for each in self.operations)]
        return [move.places(height, width) for move in moves if move is not None]


def draw_augmentation(augment: Augment, key: tuple[int, ...], height: int, width: int) -> Draw:
    """Draws what happens to an image of a size.

    The same `key` (seed, epoch, sample; none negative) gives the same draw. No global random
    generator is used.
    """
    random = np.random.default_rng(key)
    moves = draw_moves(augment, random, height, width)
    colours = Colours.draw(augment, random)
    settings = augment.rand_augment
    operations = draw_operations(settings, random) if settings else []
    return Draw(moves, colours, operations, augment.noise, random)


def noisy(pixels: torch.Tensor, deviation: float, random: np.random.Generator) -> torch.Tensor:
    """Adds Gaussian noise to uint8[3, H, W] and clips to 0..255.

    `deviation` is the standard deviation as a fraction of white.
    """
    import torch

    noise = random.standard_normal(tuple(pixels.shape), dtype=np.float32)
    return (
        (pixels + 255 * deviation * torch.from_numpy(noise)).round().clamp(0, 255).to(torch.uint8)
    )
