"""Pixels of training images, changed by the draws of an epoch."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlm_tune.config.data import Augment
from vlm_tune.data.batching.collate import Fetch
from vlm_tune.data.images.augment import Draw, draw_augmentation
from vlm_tune.data.types import Media

if TYPE_CHECKING:
    import torch

Attempts = Mapping[str, int | None]
"""The number of the draw that a sample's images take, where it is not 0; None for no moves."""


def draw_for(
    augment: Augment,
    key: tuple[int, int, str],
    attempt: int | None,
    size: tuple[int, int],
    view: int = 0,
) -> Draw:
    """Draws what happens to the images of a sample.

    Args:
        augment: What may happen to them.
        key: Seed, epoch and sample id.
        attempt: The number of the draw; None for the first one without its moves.
        size: Height and width of an image.
        view: The number of the view; each is drawn for itself.
    """
    seed, epoch, sample = key
    numbers = [seed, epoch, zlib.crc32(sample.encode())]
    if attempt or view:
        numbers.append(attempt or 0)
    if view:
        numbers.append(view)
    draw = draw_augmentation(augment, tuple(numbers), *size)
    return draw.still() if attempt is None else draw


@dataclass(frozen=True)
class Augmented:
    """Fetches pixels and augments them; the random numbers depend on (seed, epoch, sample id).

    Another `view` of the same is augmented otherwise.
    """

    fetch: Fetch
    augment: Augment
    seed: int
    epoch: int
    attempts: Attempts = field(default_factory=dict)
    view: int = 0

    def __call__(self, media: Media, sample: str) -> torch.Tensor:
        """uint8[3, H, W]."""
        pixels = self.fetch(media)
        assert not isinstance(pixels, dict)  # a native model's recipe has no augmentation
        height, width = pixels.shape[-2:]
        key = (self.seed, self.epoch, sample)
        attempt = self.attempts.get(sample, 0)
        draw = draw_for(self.augment, key, attempt, (height, width), self.view)
        return draw.pixels(pixels)
