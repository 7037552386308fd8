"""Gemma 3: a SigLIP tower, average pooling with a norm and one matrix, a Gemma 3 decoder.

The tokens of an image see each other both ways.
"""

from __future__ import annotations

import math

from vlm_tune.config.connectors import Gemma3Connector
from vlm_tune.config.towers import Gemma3Split, TransformersTower
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

BILINEAR = 2


def _parts(vlm: Vlm) -> VlmParts:
    """The parts of a Gemma 3; unsupported variants raise `ModelError`."""
    whole = whole_config(vlm)
    vision = whole.vision_config
    images = image_processor(vlm)
    check_scaling(vlm, images, BILINEAR, "bilinearly")
    if images.do_pan_and_scan:
        refuse(vlm, "images with crops of them (do_pan_and_scan)", "false")
    if {images.size.height, images.size.width} != {vision.image_size}:
        size = dict(images.size)
        refuse(vlm, f"an image processor with size {size}", f"squares of {vision.image_size}")
    if whole.text_config.use_bidirectional_attention:
        refuse(
            vlm,
            "a decoder with bidirectional attention in texts",
            "use_bidirectional_attention off",
        )
    grid = math.isqrt(whole.mm_tokens_per_image)
    if grid**2 != whole.mm_tokens_per_image:
        refuse(
            vlm, f"{whole.mm_tokens_per_image} tokens an image (mm_tokens_per_image)", "a square"
        )
    tower = TransformersTower(
        kind="transformers",
        name=vlm.name,
        layer=-1,
        final_norm=True,
        split=Gemma3Split(kind="gemma3"),
    )
    connector = Gemma3Connector(
        kind="gemma3", grid=grid, eps=vision.layer_norm_eps, weights=vlm.name
    )
    return tower, connector, "causal"


LAYOUT = Layout(
    r"^(?:model\.)?vision_tower\.(?:vision_model\.)?",
    r"^(?:model\.)?multi_modal_projector\.",
    {
        r"^language_model\.lm_head\.": "lm_head.",
        r"^(?:model\.)?language_model\.(?:{base}\.)?": "{base}.",
    },
    {"mm_input_projection_weight": "projection", "mm_soft_emb_norm.": "norm."},
)
MODULES = {
    "model.": "model.language_model.",
    "lm_head.": "lm_head.",
    "connector.projection": "model.multi_modal_projector.mm_input_projection_weight",
    "connector.norm.": "model.multi_modal_projector.mm_soft_emb_norm.",
}
GEMMA3 = Family(
    "Gemma 3", ("gemma3",), LAYOUT, _parts, decoder_config, MODULES, bidirectional="images"
)
