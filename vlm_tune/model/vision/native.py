"""Stands for the tower inside a native model, which is a part of its forward pass."""

from __future__ import annotations

from typing import Any

from vlm_tune.config.towers import NativeTower
from vlm_tune.model.vision.base import IMAGENET_MEAN, IMAGENET_STD, FeatureMaps, VisionTower

PROBED_SIDE = 224
"""Side in pixels of an image that a model is tried with."""


class NativeVision(VisionTower):
    """A tower without weights: those are the native model's."""

    def __init__(self, config: NativeTower, rebuild: dict[str, Any] | None) -> None:
        super().__init__(config, PROBED_SIDE, IMAGENET_MEAN, IMAGENET_STD)
        self.rebuild = {}

    def maps(self, pixels: Any) -> FeatureMaps:
        raise NotImplementedError("a native model's tower runs in its own forward pass")

    def measure(self) -> tuple[int, int]:
        """(1, 1): an image's tokens follow from its size."""
        return 1, 1
