"""The preprocessing of a tower's images, as the data side does it."""

from __future__ import annotations

from vlm_tune.config.model import AnyTower
from vlm_tune.data.images.decode import ImageProcessor
from vlm_tune.data.images.split import split_of
from vlm_tune.model.vision.base import VisionTower


def image_processor(section: AnyTower, tower: VisionTower) -> ImageProcessor:
    """The processor that makes a tower's images, as its section of the recipe says."""
    return ImageProcessor(
        tower.image_size,
        section.resize,
        tower.mean,
        tuple((columns, rows) for columns, rows in section.tiles),
        split_of(section.split),
    )
