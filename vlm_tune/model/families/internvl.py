"""InternVL in transformers' layout: an InternViT, a pixel shuffle with an MLP, a decoder.

An image is cut in tiles between markers (`vlm_tune/data/images/split.py`).
"""

from __future__ import annotations

from vlm_tune.config.connectors import PixelShuffleConnector
from vlm_tune.config.towers import InternVLSplit, TransformersTower
from vlm_tune.model.families.base import (
    Family,
    Layout,
    Vlm,
    VlmParts,
    check_scaling,
    decoder_config,
    image_processor,
    refuse,
    whole_config,
)

BICUBIC = 3


def _parts(vlm: Vlm) -> VlmParts:
    """The parts of an InternVL; unsupported variants raise `ModelError`."""
    whole = whole_config(vlm)
    images = image_processor(vlm, "min_patches", "max_patches")
    check_scaling(vlm, images, BICUBIC, "bicubically")
    expected = {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
    }
    for key, value in expected.items():
        if getattr(whole, key) != value:
            refuse(vlm, f"{key}: {getattr(whole, key)}", str(value))
    if images.min_patches != 1:
        refuse(vlm, f"images of at least {images.min_patches} tiles (min_patches)", "1")
    side = images.size.height
    if not side or side != images.size.width:
        refuse(vlm, f"an image processor with size {dict(images.size)}", "one square size")
    tower = TransformersTower(
        kind="transformers",
        name=vlm.name,
        layer=-1,
        final_norm=True,
        image_size=None if side == whole.vision_config.image_size[0] else side,
        split=InternVLSplit(kind="internvl", max_tiles=images.max_patches),
    )
    connector = PixelShuffleConnector(
        kind="pixel_shuffle",
        factor=round(1 / whole.downsample_ratio),
        depth=2,
        norm=True,
        weights=vlm.name,
    )
    return tower, connector, "causal"


LAYOUT = Layout(
    r"^(?:model\.)?vision_tower\.",
    r"^(?:model\.)?multi_modal_projector\.",
    {
        r"^language_model\.lm_head\.": "lm_head.",
        r"^(?:model\.)?language_model\.(?:{base}\.)?": "{base}.",
    },
    {"layer_norm.": "norm.", "linear_1.": "layers.0.", "linear_2.": "layers.2."},
)
MODULES = {
    "model.": "model.language_model.",
    "lm_head.": "lm_head.",
    "connector.norm.": "model.multi_modal_projector.layer_norm.",
    "connector.layers.0.": "model.multi_modal_projector.linear_1.",
    "connector.layers.2.": "model.multi_modal_projector.linear_2.",
}
INTERNVL = Family("InternVL", ("internvl",), LAYOUT, _parts, decoder_config, MODULES)
