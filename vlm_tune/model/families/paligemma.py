"""PaliGemma and PaliGemma 2: a SigLIP tower, one linear layer, a Gemma or Gemma 2.

The tokens of a prompt, images and question, see each other both ways.
"""

from __future__ import annotations

from typing import Any

from vlm_tune.config.connectors import LinearConnector
from vlm_tune.config.towers import TransformersTower
from vlm_tune.model.families.base import (
    Family,
    Vlm,
    VlmParts,
    decoder_config,
    refuse,
    square_images,
    whole_config,
)
from vlm_tune.model.families.llava import LLAVA

LANGUAGES = ("gemma", "gemma2")


def _parts(vlm: Vlm) -> VlmParts:
    """The parts of a PaliGemma; unsupported variants raise `ModelError`."""
    whole = whole_config(vlm)
    language = whole.text_config.model_type
    if language not in LANGUAGES:
        refuse(vlm, f"a language model of type {language}", " or ".join(LANGUAGES))
    images = square_images(vlm, whole.vision_config.image_size)
    if images != {"resize": "squash"}:
        refuse(vlm, "images that are cropped, padded or of another size", "squashed ones")
    tower = TransformersTower(
        kind="transformers", name=vlm.name, layer=-1, final_norm=True, resize="squash"
    )
    return tower, LinearConnector(kind="linear", weights=vlm.name), "causal"


def _language(vlm: Vlm) -> Any:
    config = decoder_config(vlm)
    # By this the whole model's masks are made, not those of its LLM.
    config.use_bidirectional_attention = False
    return config


MODULES = {
    "model.": "model.language_model.",
    "lm_head.": "lm_head.",
    "connector.linear.": "model.multi_modal_projector.linear.",
}
PALIGEMMA = Family("PaliGemma", ("paligemma",), LLAVA.layout, _parts, _language, MODULES, "prompt")
