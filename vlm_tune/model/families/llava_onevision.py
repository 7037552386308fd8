"""LLaVA-OneVision: a SigLIP, an MLP, a learned token for rows' ends, a decoder.

The only image of a row is seen whole and as tiles, which are joined as LLaVA-NeXT's and shrunk if
they are many; each of several images is seen whole (`vlm_tune/data/media_slots.py`).
"""

from __future__ import annotations

import re

from vlm_tune.config.connectors import MlpConnector
from vlm_tune.config.towers import LlavaOnevisionSplit, TransformersTower
from vlm_tune.model.families.base import (
    Family,
    Vlm,
    VlmParts,
    check_scaling,
    counted_layers,
    decoder_config,
    image_processor,
    refuse,
    whole_config,
)
from vlm_tune.model.families.llava import MODULES
from vlm_tune.model.families.llava_next import LAYOUT, grids_of

BICUBIC = 3


def _parts(vlm: Vlm) -> VlmParts:
    """The parts of a LLaVA-OneVision; unsupported variants raise `ModelError`."""
    whole = whole_config(vlm)
    vision = whole.vision_config
    if vision.model_type != "siglip_vision_model":
        refuse(vlm, f"a tower of type {vision.model_type}", "siglip_vision_model")
    expected = {
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": "gelu",
    }
    for key, value in expected.items():
        if getattr(whole, key) != value:
            refuse(vlm, f"{key}: {getattr(whole, key)}", str(value))
    tower = TransformersTower(
        kind="transformers",
        name=vlm.name,
        layer=counted_layers(vlm, vision.num_hidden_layers),
        resize="pad",
        split=_split(vlm, vision.image_size),
    )
    connector = MlpConnector(
        kind="mlp", bias=whole.multimodal_projector_bias, newline=True, weights=vlm.name
    )
    return tower, connector, "causal"


def _split(vlm: Vlm, side: int) -> LlavaOnevisionSplit:
    """How images are cut into tiles of `side` pixels.

    Raises `ModelError` for tiles of another size, and for another way of joining them.
    """
    ratio = str(whole_config(vlm).vision_aspect_ratio)
    most = re.fullmatch(r"anyres_max_(\d+)", ratio)
    if most is None:
        refuse(vlm, f"vision_aspect_ratio: {ratio}", "anyres_max_9, or another number")
    images = image_processor(vlm, "image_grid_pinpoints")
    check_scaling(vlm, images, BICUBIC, "bicubically")
    crop = images.crop_size
    sides = {images.size.height, images.size.width, *((crop.height,) if crop else ())}
    if sides != {side}:
        refuse(vlm, f"tiles of {sides} pixels", f"{side}, the tower's image_size")
    return LlavaOnevisionSplit(
        kind="llava_onevision",
        grids=grids_of(vlm, images.image_grid_pinpoints, side),
        max_tiles=int(most[1]),
    )


LLAVA_ONEVISION = Family(
    "LLaVA-OneVision", ("llava_onevision",), LAYOUT, _parts, decoder_config, MODULES
)
