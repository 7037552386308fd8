"""The towers by their kind in a recipe."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vlm_tune.config.connectors import AnyConnector, OfAnyShape, PatchMergerConnector
from vlm_tune.config.model import AnySection
from vlm_tune.config.towers import (
    AnyTower,
    AudioTower,
    NativeTower,
    OpenClipTower,
    PairTower,
    TimmTower,
    TransformersTower,
)
from vlm_tune.data.images.decode import ImageProcessor
from vlm_tune.data.images.shaped import ShapedImages
from vlm_tune.data.images.split import split_of
from vlm_tune.data.media_processor import MediaProcessor
from vlm_tune.errors import ModelError
from vlm_tune.model.audio_tower import WhisperTower, audio_config, audio_processor
from vlm_tune.model.media_tower import MediaTower
from vlm_tune.model.vision.base import FeatureMaps, VisionTower, pool, resized
from vlm_tune.model.vision.native import NativeVision
from vlm_tune.model.vision.open_clip_tower import OpenClipVision, open_clip_config
from vlm_tune.model.vision.shaped_tower import SHAPED, ShapedVision
from vlm_tune.model.vision.timm_tower import TimmVision
from vlm_tune.model.vision.transformers_tower import (
    TransformersVision,
    described_vision,
    pretrained_vision,
    transformers_config,
)


class PairVision(VisionTower):
    """Two towers side by side, each with its own image size and normalisation.

    Their features are pooled to one grid and concatenated by channel.
    """

    def __init__(self, config: PairTower, rebuild: dict[str, Any] | None) -> None:
        sources = rebuild["towers"] if rebuild else [None, None]
        towers: list[Any] = [
            build_tower(part, source) for part, source in zip(config.towers, sources, strict=True)
        ]
        odd = [part.resize for part in config.towers if part.resize not in ("crop", config.resize)]
        if odd:
            raise ModelError(
                f"two towers see one image: set model.tower.resize: {odd[0]} for the pair, "
                "not for one of them"
            )
        if len({getattr(part, "class_token", False) for part in config.towers}) > 1:
            raise ModelError(
                "model.tower.towers: two towers side by side need class_token in both or in none"
            )
        if any(tower.keeps_shape for tower in towers):
            raise ModelError(
                "model.tower.towers: two towers side by side need images of one shape, and one of "
                "these keeps an image's own"
            )
        super().__init__(
            config,
            config.image_size or max(tower.image_size for tower in towers),
            towers[0].mean,
            towers[0].std,
        )
        self.towers = nn.ModuleList(towers)
        self.rebuild = {"towers": [tower.rebuild for tower in towers]}

    def pooled_maps(self, pixels: torch.Tensor) -> FeatureMaps:
        every = [
            tower.pooled_maps(resized(pixels, tower.image_size))  # type: ignore[operator, arg-type]
            for tower in self.towers
        ]
        grid = self.grid or min(one.shape[-1] for maps, _ in every for one in maps)
        first = [token for _, token in every if token is not None]
        return [pool(one, grid) for maps, _ in every for one in maps], torch.cat(
            first, dim=2
        ) if first else None


def architecture(config: AnyTower) -> dict[str, Any] | None:
    """The description from which `build_tower` makes a recipe's tower without its weights.

    It is None where the recipe itself describes the architecture. Raises `ModelError` for unknown
    names.
    """
    if isinstance(config, PairTower):
        return {"towers": [architecture(part) for part in config.towers]}
    if isinstance(config, TransformersTower):
        return transformers_config(config.name)
    if isinstance(config, NativeTower):
        return None
    if isinstance(config, TimmTower):
        return {"timm": config.name}
    if isinstance(config, AudioTower):
        return audio_config(config)
    return open_clip_config(config.name) if config.name else None


def transformers_tower(config: TransformersTower, rebuild: dict[str, Any] | None) -> VisionTower:
    """A tower of transformers, of one shape of images or of any, as `build_tower` makes it."""
    source = rebuild or transformers_config(config.name)
    model = described_vision(source) if rebuild else pretrained_vision(config, source)
    kind = SHAPED.get(source["vision_config"]["model_type"], TransformersVision)
    return kind(config, source, model)


TOWERS: dict[str, Callable[..., MediaTower]] = {
    "open_clip": OpenClipVision,
    "transformers": transformers_tower,
    "timm": TimmVision,
    "pair": PairVision,
    "native": NativeVision,
    "audio": WhisperTower,
}


def media_processor(section: AnySection, tower: MediaTower) -> MediaProcessor:
    """The preprocessing of the media that a recipe's tower takes, for its connector.

    Raises `ModelError` for a connector that does not take the shapes of the tower's images.
    """
    config = section.tower
    _check_shapes(section.connector, tower)
    if isinstance(config, AudioTower):
        assert isinstance(tower, WhisperTower)
        return audio_processor(config, tower)
    assert isinstance(tower, VisionTower)
    if isinstance(tower, ShapedVision):
        assert isinstance(config, TransformersTower)
        connector = section.connector
        merge = connector.factor if isinstance(connector, PatchMergerConnector) else 1
        return ShapedImages(
            tower.image_size,
            mean=tower.mean,
            sizing=tower.sizing(merge),
            patch=tower.patch,
            merge=merge,
            row_ends=config.row_ends,
        )
    return ImageProcessor(
        tower.image_size,
        config.resize,
        tower.mean,
        tuple((columns, rows) for columns, rows in config.tiles),
        split_of(config.split),
    )


def _check_shapes(connector: AnyConnector, tower: MediaTower) -> None:
    if tower.keeps_shape and not isinstance(connector, OfAnyShape):
        raise ModelError(
            f"a connector of kind {connector.kind} needs images of one shape, and the tower keeps "
            "an image's own: choose mlp, linear or patch_merger"
        )
    if isinstance(connector, PatchMergerConnector) and not tower.keeps_shape:
        raise ModelError(
            "a connector of kind patch_merger needs a tower that keeps an image's shape: choose "
            "pixel_shuffle for one that takes square images"
        )


def build_tower(config: AnyTower, rebuild: dict[str, Any] | None = None) -> MediaTower:
    """Builds a recipe's tower with its weights, or from `rebuild` with random weights.

    Raises `ModelError` for an unknown name, layer or architecture.
    """
    kind: Any = TOWERS[config.kind]
    # Convolutions are several times faster with channels last, on CPUs and GPUs; transformers are
    # unaffected.
    return kind(config, rebuild).to(memory_format=torch.channels_last)


def meta_tower(config: AnyTower, rebuild: dict[str, Any] | None = None) -> MediaTower:
    """Builds a recipe's tower on the meta device, and measures it; to be read, not changed.

    A run asks for it several times, so one that the recipe describes by itself is kept. Raises
    `ModelError` as `build_tower`.
    """
    if isinstance(config, OpenClipTower) and config.name is None and rebuild is None:
        return _described_tower(config.model_dump_json())
    return _measured_on_meta(config, rebuild)


@functools.lru_cache(maxsize=16)
def _described_tower(config_json: str) -> MediaTower:
    return _measured_on_meta(OpenClipTower.model_validate_json(config_json), None)


def _measured_on_meta(config: AnyTower, rebuild: dict[str, Any] | None) -> MediaTower:
    with torch.device("meta"):
        tower = build_tower(config, rebuild or architecture(config))
        tower.measure()
    return tower
