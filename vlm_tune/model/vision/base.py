"""Base class of the vision towers: pixels in, patch features and their grid out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import interpolate

from vlm_tune.config.towers import Tower
from vlm_tune.model.media_tower import MediaTower
from vlm_tune.model.pooling import grid_means

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

FeatureMaps = tuple[list[torch.Tensor], torch.Tensor | None]
"""Feature maps float[B, C, h, w], and the class token's features float[B, 1, C] if configured."""


class VisionTower(MediaTower):
    """Base class of the towers of images; a subclass implements `maps`."""

    image_size: int
    scale: torch.Tensor
    offset: torch.Tensor
    input_dtype = torch.uint8

    def __init__(
        self, config: Tower, image_size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__(is_pretrained=bool(getattr(config, "pretrained", None)))
        self.grid = config.grid
        self.image_size = image_size
        self.input_shape = (3, image_size, image_size)
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.register_buffer(
            "scale", torch.tensor([1 / (255 * s) for s in std]).view(1, 3, 1, 1), persistent=False
        )
        self.register_buffer(
            "offset",
            torch.tensor([m / s for m, s in zip(mean, std, strict=True)]).view(1, 3, 1, 1),
            persistent=False,
        )

    def maps(self, pixels: torch.Tensor) -> FeatureMaps:
        """Feature maps of normalised pixels float[B, 3, H, W]."""
        raise NotImplementedError

    def pooled_maps(self, pixels: torch.Tensor) -> FeatureMaps:
        """Feature maps of pixels [B, 3, H, W] of 0 to 255, pooled to the tower's grid."""
        dtype = next(self.parameters()).dtype
        maps, first = self.maps(
            (pixels.float() * self.scale - self.offset).to(dtype, memory_format=torch.channels_last)
        )
        return [pool(one, self.grid) for one in maps], first

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features [B, N, D] of uint8 pixels [B, 3, H, W], in row-major order of the image."""
        maps, first = self.pooled_maps(pixels)
        features = torch.cat(maps, dim=1).flatten(2).transpose(1, 2)
        return features if first is None else torch.cat([first, features], dim=1)


def pool(features: torch.Tensor, grid: int | None) -> torch.Tensor:
    """Pools a feature map [B, C, h, w] to [B, C, grid, grid]; unchanged where `grid` is None."""
    if grid is None:
        return features
    height, width = features.shape[-2:]
    means = grid_means(features.flatten(2).transpose(1, 2), (height, width), grid)
    return means.transpose(1, 2).unflatten(2, (grid, grid))


def resized(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Resizes pixels [B, 3, S, S] of 0 to 255 to [B, 3, size, size], bicubic."""
    if pixels.shape[-1] == size:
        return pixels
    return (
        interpolate(pixels.float(), (size, size), mode="bicubic", antialias=True)
        .round()
        .clamp(0, 255)
    )
