"""The towers by their kind in a recipe, and what they are built from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlm_tune.config.model import AnyTower, PairTower, TimmTower, TransformersTower
from vlm_tune.errors import ModelError
from vlm_tune.model.vision.base import Found, VisionTower, pool, resized
from vlm_tune.model.vision.open_clip_tower import OpenClipVision, open_clip_config
from vlm_tune.model.vision.timm_tower import TimmVision
from vlm_tune.model.vision.transformers_tower import TransformersVision, transformers_config


class PairVision(VisionTower):
    """Two towers side by side, each with its own size and normalisation; features of equal grids joined by channel."""

    def __init__(self, config: PairTower, rebuild: dict[str, Any] | None) -> None:
        sources = rebuild["towers"] if rebuild else [None, None]
        towers = [
            build_tower(part, source) for part, source in zip(config.towers, sources, strict=True)
        ]
        odd = [part.resize for part in config.towers if part.resize not in ("crop", config.resize)]
        if odd:
            raise ModelError(
                f"two towers see one image: set model.tower.resize: {odd[0]} for the pair, not for one of them"
            )
        if len({getattr(part, "class_token", False) for part in config.towers}) > 1:
            raise ModelError(
                "model.tower.towers: two towers side by side need class_token in both or in none"
            )
        super().__init__(
            config,
            config.image_size or max(tower.image_size for tower in towers),
            towers[0].mean,
            towers[0].std,
        )
        self.towers = nn.ModuleList(towers)
        self.rebuild = {"towers": [tower.rebuild for tower in towers]}

    def found(self, pixels: torch.Tensor) -> Found:
        every = [tower.found(resized(pixels, tower.image_size)) for tower in self.towers]  # type: ignore[operator, arg-type]
        grid = self.grid or min(one.shape[-1] for maps, _ in every for one in maps)
        first = [token for _, token in every if token is not None]
        return [pool(one, grid) for maps, _ in every for one in maps], torch.cat(
            first, dim=2
        ) if first else None


def architecture(config: AnyTower) -> dict[str, Any] | None:
    """What `build_tower` needs to make a recipe's tower without its weights; None where that is the recipe itself.

    Raises `ModelError` for unknown names.
    """
    if isinstance(config, PairTower):
        return {"towers": [architecture(part) for part in config.towers]}
    if isinstance(config, TransformersTower):
        return transformers_config(config.name)
    if isinstance(config, TimmTower):
        return {"timm": config.name}
    return open_clip_config(config.name) if config.name else None


TOWERS: dict[str, type[VisionTower]] = {
    "open_clip": OpenClipVision,
    "transformers": TransformersVision,
    "timm": TimmVision,
    "pair": PairVision,
}


def build_tower(config: AnyTower, rebuild: dict[str, Any] | None = None) -> VisionTower:
    """The recipe's tower with its weights, or with `rebuild` the same architecture with random ones.

    Raises `ModelError` for an unknown name, layer or architecture.
    """
    kind: Any = TOWERS[config.kind]
    # Convolutions are several times faster with channels last, on CPUs and GPUs; transformers don't mind.
    return kind(config, rebuild).to(memory_format=torch.channels_last)
