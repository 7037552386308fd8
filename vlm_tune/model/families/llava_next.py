"""LLaVA-NeXT (LLaVA-1.6): a CLIP or SigLIP, an MLP, a learned token for rows' ends, a decoder.

An image is seen whole and as tiles, which are joined without the padding around the image
(`vlm_tune/data/media_slots.py`).
"""

from __future__ import annotations

from typing import Literal

from vlm_tune.config.connectors import MlpConnector
from vlm_tune.config.towers import LlavaNextSplit, TransformersTower
from vlm_tune.model.families.base import (
    Family,
    Layout,
    Vlm,
    VlmParts,
    check_scaling,
    counted_layers,
    decoder_config,
    image_processor,
    refuse,
    whole_config,
)
from vlm_tune.model.families.llava import LLAVA, MODULES

BICUBIC = 3
STRATEGIES: dict[str, Literal["default", "full"]] = {
    "clip_vision_model": "default",
    "siglip_vision_model": "full",
}
"""Which of a tower's tokens are features, by its type: all but the class token, where it has one.
"""


def _parts(vlm: Vlm) -> VlmParts:
    """The parts of a LLaVA-NeXT; unsupported variants raise `ModelError`."""
    whole = whole_config(vlm)
    vision = whole.vision_config
    if vision.model_type not in STRATEGIES:
        refuse(vlm, f"a tower of type {vision.model_type}", " or ".join(STRATEGIES))
    expected = {
        "vision_feature_select_strategy": STRATEGIES[vision.model_type],
        "projector_hidden_act": "gelu",
    }
    for key, value in expected.items():
        if getattr(whole, key) != value:
            refuse(vlm, f"{key}: {getattr(whole, key)}", str(value))
    tower = TransformersTower(
        kind="transformers",
        name=vlm.name,
        layer=counted_layers(vlm, vision.num_hidden_layers),
        split=LlavaNextSplit(kind="llava_next", grids=_grids(vlm, vision.image_size)),
    )
    connector = MlpConnector(
        kind="mlp", bias=whole.multimodal_projector_bias, newline=True, weights=vlm.name
    )
    return tower, connector, "causal"


def _grids(vlm: Vlm, side: int) -> list[list[int]]:
    """The grids [columns, rows] of tiles of `side` pixels that the image processor chooses from.

    Raises `ModelError` for tiles of another size.
    """
    images = image_processor(vlm, "image_grid_pinpoints", "crop_size")
    check_scaling(vlm, images, BICUBIC, "bicubically")
    sizes = {images.size.shortest_edge or images.size.height, images.crop_size.height}
    if sizes != {side}:
        refuse(vlm, f"tiles of {sizes} pixels", f"{side}, the tower's image_size")
    return grids_of(vlm, images.image_grid_pinpoints, side)


def grids_of(vlm: Vlm, pinpoints: list[list[int]], side: int) -> list[list[int]]:
    """The grids [columns, rows] of tiles of an image processor's sizes [height, width] in pixels.

    Raises `ModelError` for sizes that the model's config has not, or that tiles do not fill.
    """
    if pinpoints != whole_config(vlm).image_grid_pinpoints:
        refuse(vlm, "two lists of image_grid_pinpoints", "one list in both of its configs")
    if any(pixels % side for size in pinpoints for pixels in size):
        refuse(vlm, f"image_grid_pinpoints {pinpoints}", f"multiples of {side}")
    return [[width // side, height // side] for height, width in pinpoints]


SCALED = ("granite",)
"""Granite Vision was trained with the logits of Granite's own class, which vLLM and llama.cpp
compute too; transformers' LLaVA-NeXT leaves the scale out, so greedy text is the same."""
LAYOUT = Layout(
    LLAVA.layout.tower,
    r"^(?:model\.)?(?:multi_modal_projector\.|(?=image_newline$))",
    LLAVA.layout.language,
    {"linear_1.": "layers.0.", "linear_2.": "layers.2.", "image_newline": "newline"},
)
LLAVA_NEXT = Family(
    "LLaVA-NeXT",
    ("chatml", "llama3", "vicuna"),
    LAYOUT,
    _parts,
    decoder_config,
    MODULES,
    by_language={"mistral": "llava_mistral", "granite": "granite_vision"},
    scaled=SCALED,
)
