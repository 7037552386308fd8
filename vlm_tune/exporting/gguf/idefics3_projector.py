"""llama.cpp's projector of Idefics3 and SmolVLM: a pixel shuffle, one linear layer, tiles."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from vlm_tune.config.towers import Idefics3Split, Tower
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.images.decode import image_size
from vlm_tune.data.images.split import Idefics3Frames
from vlm_tune.data.types import Media
from vlm_tune.exporting.gguf.projector import (
    IMAGE_SLOT,
    Projector,
    clip_names,
    connector_tensors,
)
from vlm_tune.exporting.hf_layout import vision_of
from vlm_tune.exporting.idefics3_layout import part_reasons
from vlm_tune.exporting.llava_layout import bidirectional_reasons
from vlm_tune.model.connectors.projectors import PixelShuffle
from vlm_tune.model.vlm import VisionLanguageConfig, VisionLanguageNetwork
from vlm_tune.quoting import applying

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from vlm_tune.exporting.gguf.mmproj_reading import Mmproj

VISION_TYPES = ("idefics3_vision", "smolvlm_vision")
AROUND = Idefics3Frames.around
MARKERS = ("\n", "\n\n", AROUND, Idefics3Frames.whole)
"""What llama.cpp puts around frames, which it looks up in the vocabulary as one token each."""


def _reasons(config: VisionLanguageConfig, text: Any) -> list[str]:
    vision = config.tower_rebuild.get("vision_config", {})
    model_type = vision.get("model_type")
    tower = config.model.tower
    split = tower.split if isinstance(tower, Tower) else None
    side = (isinstance(tower, Tower) and tower.image_size) or vision.get("image_size") or 1
    longest = split.longest_edge if isinstance(split, Idefics3Split) else 2 * side
    return [
        *part_reasons(config, "Idefics3"),
        *bidirectional_reasons(config),
        *applying(
            (
                model_type not in VISION_TYPES,
                f"its tower is of type {model_type}, Idefics3's {' or '.join(VISION_TYPES)}",
            ),
            (
                side != vision.get("image_size", side),
                f"its frames have {side} pixels a side and its tower's positions "
                f"{vision.get('image_size')} (model.tower.image_size)",
            ),
            (
                longest % side or longest == side,
                f"its longest_edge is {longest}, and llama.cpp cuts images as in training where "
                f"that is a multiple of a frame's {side} pixels, two frames at least "
                "(model.tower.split.longest_edge)",
            ),
        ),
    ]


def _notes(model: VisionLanguageNetwork) -> list[str]:
    return [
        "llama.cpp resizes images by a Lanczos filter of its own, whose pixels can differ a little "
        "from those of training where an image shrinks"
    ]


def _vision(tower: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    vision = tower.model
    config = copy.deepcopy(vision.config)
    config.num_hidden_layers = len(vision.encoder.layers)
    norm = {f"post_layernorm.{key}": value for key, value in tower.norm.state_dict().items()}
    return config, clip_names({**vision.state_dict(), **norm})


def _describe(writer: GGUFWriter, vision: Any, model: VisionLanguageNetwork) -> None:
    _, images = vision_of(model)
    assert isinstance(model.connector, PixelShuffle)
    assert isinstance(images.split, Idefics3Frames)
    writer.add_vision_projector_scale_factor(model.connector.factor)
    writer.add_vision_preproc_image_size(images.split.longest_edge)


def _connector(model: VisionLanguageNetwork, dtype: str) -> dict[str, torch.Tensor]:
    return connector_tensors(model.connector, {"layers.0": "mm.model.fc"})


def _features(mmproj: Mmproj, pixels: torch.Tensor) -> torch.Tensor:
    return mmproj.linear("mm.model.fc", mmproj.shuffled(mmproj.encode(pixels)))


def _image_ids(
    tokenizer: Any, vision: dict[str, Any], media: Media, processor: Processor
) -> list[int]:
    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    columns, rows = _grid(image_size(media), vision["preproc_image_size"], vision["image_size"])
    frame = [IMAGE_SLOT] * processor.spec.tokens_per_image
    image: list[int] = []
    for row in range(rows):
        for column in range(columns):
            image += ids(f"{AROUND}<row_{row + 1}_col_{column + 1}>") + frame
        image += ids("\n") if row < rows - 1 else []
    return [*image, *ids("\n\n"), *ids(AROUND), *ids(Idefics3Frames.whole), *frame, *ids(AROUND)]


def _grid(size: tuple[int, int], longest: int, side: int) -> tuple[int, int]:
    """The number of columns and rows of tiles as llama.cpp computes them.

    `mtmd_image_preprocessor_idefics3::preprocess` in its `mtmd-image.cpp`.
    """
    width, height = size
    ratio = width / height
    shorter = int(longest / ratio) if width >= height else int(longest * ratio)
    across = -(-(shorter + shorter % 2) // side)
    along = -(-longest // side)
    return (along, across) if width >= height else (across, along)


IDEFICS3 = Projector(
    name="idefics3",
    reasons=_reasons,
    markers=MARKERS,
    notes=_notes,
    vision=_vision,
    describe=_describe,
    connector=_connector,
    features=_features,
    image_ids=_image_ids,
)
