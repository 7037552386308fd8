"""Image augmentations; all random numbers come from the generator passed in, never a global one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from vlm_tune.config.data import RandAugment

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


def crop_box(
    random: np.random.Generator, height: int, width: int, smallest: float
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop of at least the share `smallest` of the area."""
    share = random.uniform(smallest, 1)
    # A larger stretch than 1 / share would need more than a whole side.
    most = math.log(min(ASPECT, 1 / share))
    stretch = math.exp(random.uniform(-most, most))
    high = min(math.ceil(height * math.sqrt(share / stretch)), height)
    wide = min(math.ceil(width * math.sqrt(share * stretch)), width)
    return (
        int(random.integers(0, height - high + 1)),
        int(random.integers(0, width - wide + 1)),
        high,
        wide,
    )


def zoomed_out(pixels: torch.Tensor, smallest: float, random: np.random.Generator) -> torch.Tensor:
    """Shrinks uint8[3, H, W] to a random part of its frame, at a random place.

    The rest has the median colour of the image's border: the background of most drawings.

    Args:
        pixels: uint8[3, H, W].
        smallest: the smallest share of the sides; one side may be up to `ASPECT` times shorter.
        random: draws share, aspect and place.
    """
    import torch
    from torchvision.transforms.v2 import functional

    height, width = pixels.shape[-2:]
    share = random.uniform(smallest, 1)
    stretch = math.exp(random.uniform(-math.log(ASPECT), math.log(ASPECT)))
    high = max(round(height * share * min(stretch, 1)), 1)
    wide = max(round(width * share * min(1 / stretch, 1)), 1)
    top = int(random.integers(0, height - high + 1))
    left = int(random.integers(0, width - wide + 1))
    border = torch.cat([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], dim=1)
    frame = border.median(1).values[:, None, None].expand(3, height, width).clone()
    frame[:, top : top + high, left : left + wide] = functional.resize(
        pixels, [high, wide], antialias=True
    )
    return frame


def warp(
    pixels: torch.Tensor,
    *,
    turn: float = 0.0,
    shift: tuple[float, float] = (0.0, 0.0),
    shear: tuple[float, float] = (0.0, 0.0),
) -> torch.Tensor:
    """Rotates uint8[3, H, W] about its centre, shifts and shears it, with bilinear interpolation.

    Pixels outside the image are those of its nearest edge.

    Args:
        pixels: uint8[3, H, W].
        turn: Rotation in degrees, counter-clockwise.
        shift: (x, y) as fractions of the sides.
        shear: (x, y) shear factors.
    """
    import torch
    from torch.nn.functional import affine_grid, grid_sample

    height, width = pixels.shape[-2:]
    cos = math.cos(math.radians(turn))
    sin = math.sin(math.radians(turn))
    # The position in the old image of each pixel of the new one, in fractions of half a side from
    # the centre.
    back = np.array([[1, shear[0]], [shear[1], 1]]) @ np.array([[cos, -sin], [sin, cos]])
    back *= np.array([[1, height / width], [width / height, 1]])
    matrix = np.concatenate([back, [[-2 * shift[0]], [-2 * shift[1]]]], axis=1)
    grid = affine_grid(
        torch.from_numpy(matrix).float()[None], [1, 3, height, width], align_corners=False
    )
    moved = grid_sample(
        pixels[None].float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )[0]
    return moved.round().clamp(0, 255).to(torch.uint8)


def rand_augment(
    pixels: torch.Tensor, settings: RandAugment, random: np.random.Generator
) -> torch.Tensor:
    """Applies RandAugment (https://arxiv.org/abs/1909.13719) to uint8[3, H, W].

    Operations are drawn uniformly, with torchvision's list and strengths. Unlike torchvision, which
    fills with black, pixels moved in from outside the image are those of its edge.
    """
    from torchvision.transforms.v2 import functional as f

    strength = settings.magnitude / STRONGEST
    for operation in random.integers(0, len(OPERATIONS), settings.ops):
        signed = strength if random.random() < 0.5 else -strength
        match OPERATIONS[operation]:
            case "shear_x":
                pixels = warp(pixels, shear=(0.3 * signed, 0.0))
            case "shear_y":
                pixels = warp(pixels, shear=(0.0, 0.3 * signed))
            case "shift_x":
                pixels = warp(pixels, shift=(150 / 331 * signed, 0.0))
            case "shift_y":
                pixels = warp(pixels, shift=(0.0, 150 / 331 * signed))
            case "turn":
                pixels = warp(pixels, turn=30 * signed)
            case "brightness":
                pixels = f.adjust_brightness(pixels, 1 + 0.9 * signed)
            case "saturation":
                pixels = f.adjust_saturation(pixels, 1 + 0.9 * signed)
            case "contrast":
                pixels = f.adjust_contrast(pixels, 1 + 0.9 * signed)
            case "sharpness":
                pixels = f.adjust_sharpness(pixels, 1 + 0.9 * signed)
            case "posterize":
                pixels = f.posterize(pixels, 8 - round(4 * strength))
            case "solarize":
                pixels = f.solarize(pixels, 255 * (1 - strength))
            case "autocontrast":
                pixels = f.autocontrast(pixels)
            case "equalize":
                pixels = f.equalize(pixels)
    return pixels


def noisy(pixels: torch.Tensor, deviation: float, random: np.random.Generator) -> torch.Tensor:
    """Adds Gaussian noise to uint8[3, H, W] and clips to 0..255.

    `deviation` is the standard deviation as a fraction of white.
    """
    import torch

    noise = random.standard_normal(tuple(pixels.shape), dtype=np.float32)
    return (
        (pixels + 255 * deviation * torch.from_numpy(noise)).round().clamp(0, 255).to(torch.uint8)
    )
