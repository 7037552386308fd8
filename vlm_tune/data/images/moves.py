"""Moves of an image's content, each as a change of pixels and as a map of places.

Places are in pixels and continuous: (0, 0) is the upper left corner of the first pixel, and (W, H)
the lower right one of the last.

Shapes: H height, W width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vlm_tune.data.affine import Affine

if TYPE_CHECKING:
    import torch


class Move(Protocol):
    """A move of an image's content within its frame."""

    def pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Moves uint8[3, H, W]."""
        ...

    def places(self, height: int, width: int) -> Affine:
        """Where the places of an image of this size go."""
        ...


@dataclass(frozen=True)
class Crop:
    """Shows a part of the image, resized to the whole frame."""

    top: int
    left: int
    height: int
    width: int

    def pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        from torchvision.transforms.v2 import functional

        part = (self.top, self.left, self.height, self.width)
        return functional.resized_crop(pixels, *part, list(pixels.shape[-2:]), antialias=True)

    def places(self, height: int, width: int) -> Affine:
        larger = Affine.scale(width / self.width, height / self.height)
        return Affine.shift(-self.left, -self.top).then(larger)


@dataclass(frozen=True)
class ZoomOut:
    """Shrinks the image to a part of its frame; the rest has the median colour of its border."""

    top: int
    left: int
    height: int
    width: int

    def pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        import torch
        from torchvision.transforms.v2 import functional

        border = torch.cat([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], dim=1)
        frame = border.median(1).values[:, None, None].expand(pixels.shape).clone()
        down = slice(self.top, self.top + self.height)
        across = slice(self.left, self.left + self.width)
        frame[:, down, across] = functional.resize(
            pixels, [self.height, self.width], antialias=True
        )
        return frame

    def places(self, height: int, width: int) -> Affine:
        smaller = Affine.scale(self.width / width, self.height / height)
        return smaller.then(Affine.shift(self.left, self.top))


@dataclass(frozen=True)
class Flip:
    """Mirrors the image left to right."""

    def pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flip(-1)

    def places(self, height: int, width: int) -> Affine:
        return Affine.of((-1.0, 0.0, width), (0.0, 1.0, 0.0))


@dataclass(frozen=True)
class Transpose:
    """Exchanges height and width of a square image."""

    def pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.transpose(-1, -2)

    def places(self, height: int, width: int) -> Affine:
        return Affine.of((0.0, 1.0, 0.0), (1.0, 0.0, 0.0))


@dataclass(frozen=True)
class Shift:
    """Moves the image by whole pixels; edge pixels are repeated."""

    down: int
    right: int

    def pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        from torchvision.transforms.v2 import functional

        height, width = pixels.shape[-2:]
        most = max(abs(self.down), abs(self.right))
        padded = functional.pad(pixels, [most, most, most, most], padding_mode="edge")
        top, left = most - self.down, most - self.right
        return padded[:, top : top + height, left : left + width]

    def places(self, height: int, width: int) -> Affine:
        return Affine.shift(self.right, self.down)


@dataclass(frozen=True)
class Warp:
    """Rotates about the centre, shifts and shears, bilinearly; edge pixels are repeated.

    Attributes:
        turn: Rotation in degrees, counter-clockwise.
        shift: (x, y) as fractions of the sides.
        shear: (x, y) shear factors.
    """

    turn: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)
    shear: tuple[float, float] = (0.0, 0.0)

    def _back(self, height: int, width: int) -> np.ndarray:
        """Where each place of the new image was in the old one: float64[2, 3].

        Places are in fractions of half a side from the centre, as `affine_grid` takes them.
        """
        cos = math.cos(math.radians(self.turn))
        sin = math.sin(math.radians(self.turn))
        back = np.array([[1, self.shear[0]], [self.shear[1], 1]]) @ np.array(
            [[cos, -sin], [sin, cos]]
        )
        back *= np.array([[1, height / width], [width / height, 1]])
        return np.concatenate([back, [[-2 * self.shift[0]], [-2 * self.shift[1]]]], axis=1)

    def pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        import torch
        from torch.nn.functional import affine_grid, grid_sample

        height, width = pixels.shape[-2:]
        back = torch.from_numpy(self._back(height, width)).float()[None]
        grid = affine_grid(back, [1, 3, height, width], align_corners=False)
        moved = grid_sample(
            pixels[None].float(), grid, mode="bilinear", padding_mode="border", align_corners=False
        )[0]
        return moved.round().clamp(0, 255).to(torch.uint8)

    def places(self, height: int, width: int) -> Affine:
        centred = Affine.scale(2 / width, 2 / height).then(Affine.shift(-1.0, -1.0))
        back = Affine(np.concatenate([self._back(height, width), [[0.0, 0.0, 1.0]]]))
        return centred.then(back.inverse()).then(centred.inverse())
