"""Idefics3 and SmolVLM: a SigLIP-like tower, a pixel shuffle with one linear layer, a decoder.

An image is cut in tiles with markers (`vlm_tune/data/images/split.py`).
"""

from __future__ import annotations

from vlm_tune.config.connectors import PixelShuffleConnector
from vlm_tune.config.towers import Idefics3Split, TransformersTower
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

LANCZOS = 1
LONGEST = 4096
"""The longest side to which transformers resizes an image."""


def _parts(vlm: Vlm) -> VlmParts:
    """The parts of an Idefics3 or SmolVLM; unsupported variants raise `ModelError`."""
    whole = whole_config(vlm)
    images = image_processor(vlm, "do_image_splitting", "max_image_size")
    check_scaling(vlm, images, LANCZOS, "by Lanczos")
    if not images.do_image_splitting:
        refuse(vlm, "images that are not tiled (do_image_splitting)", "true")
    longest_edge = images.size.longest_edge
    side = images.max_image_size["longest_edge"]
    if not longest_edge or not side <= longest_edge <= LONGEST:
        refuse(
            vlm,
            f"an image processor with size {dict(images.size)}",
            f"a longest_edge from {side} to {LONGEST}",
        )
    tower = TransformersTower(
        kind="transformers",
        name=vlm.name,
        layer=-1,
        final_norm=True,
        image_size=None if side == whole.vision_config.image_size else side,
        split=Idefics3Split(kind="idefics3", longest_edge=longest_edge),
    )
    connector = PixelShuffleConnector(
        kind="pixel_shuffle", factor=whole.scale_factor, depth=1, bias=False, weights=vlm.name
    )
    return tower, connector, "causal"


LAYOUT = Layout(
    r"^model\.vision_model\.",
    r"^model\.connector\.",
    {r"^model\.text_model\.": "{base}."},
    {"modality_projection.proj.": "layers.0."},
)
MODULES = {
    "model.": "model.text_model.",
    "lm_head.": "lm_head.",
    "connector.layers.0.": "model.connector.modality_projection.proj.",
}
# The first SmolVLMs are stored as Idefics3.
IDEFICS3 = Family("Idefics3", ("smolvlm", "idefics3"), LAYOUT, _parts, decoder_config, MODULES)
SMOLVLM = Family("SmolVLM", ("smolvlm",), LAYOUT, _parts, decoder_config, MODULES)
