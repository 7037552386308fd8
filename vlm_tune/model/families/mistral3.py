"""Mistral 3 and Pixtral: a tower that keeps an image's shape, a projection, a decoder.

Mistral 3 (Mistral Small 3.1 and later, Ministral 3) joins squares of patches (`PatchMerger`).
Pixtral-12B is a LLaVA of transformers with Pixtral's tower. After each row of an image's tokens
stands a token of the text (`vlm_tune/data/images/shaped.py`).
"""

from __future__ import annotations

from typing import Any

from vlm_tune.config.connectors import MlpConnector, PatchMergerConnector
from vlm_tune.config.towers import TransformersTower
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
from vlm_tune.model.families.llava import MODULES

BICUBIC = 3


def _expect(vlm: Vlm, expected: dict[str, Any]) -> Any:
    """The whole model's config, which has the expected values. Raises `ModelError`."""
    whole = whole_config(vlm)
    for key, value in expected.items():
        if getattr(whole, key, value) != value:
            refuse(vlm, f"{key}: {getattr(whole, key)}", str(value))
    if whole.vision_config.model_type != "pixtral":
        refuse(vlm, f"a tower of type {whole.vision_config.model_type}", "pixtral")
    return whole


def _tower(vlm: Vlm, whole: Any, merge: int) -> TransformersTower:
    """Pixtral's tower, with the longest edge of the checkpoint's image processor."""
    images = image_processor(vlm, "patch_size")
    check_scaling(vlm, images, BICUBIC, "bicubically")
    vision = whole.vision_config
    longest = images.size.longest_edge
    unit = vision.patch_size * merge
    if not longest or longest % unit:
        refuse(
            vlm,
            f"an image processor with size {dict(images.size)}",
            f"a longest_edge that is a multiple of {unit}",
        )
    return TransformersTower(
        kind="transformers",
        name=vlm.name,
        layer=-1,
        row_ends=True,
        image_size=None if longest == vision.image_size else longest,
    )


def _mistral3(vlm: Vlm) -> VlmParts:
    """The parts of a Mistral 3; unsupported variants raise `ModelError`."""
    whole = _expect(vlm, {"vision_feature_layer": -1, "projector_hidden_act": "gelu"})
    merge = whole.spatial_merge_size
    connector = PatchMergerConnector(
        kind="patch_merger",
        factor=merge,
        bias=whole.multimodal_projector_bias,
        eps=whole.text_config.rms_norm_eps,
        weights=vlm.name,
    )
    return _tower(vlm, whole, merge), connector, "causal"


def _pixtral(vlm: Vlm) -> VlmParts:
    """The parts of a LLaVA with Pixtral's tower; unsupported variants raise `ModelError`."""
    expected = {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
    }
    whole = _expect(vlm, expected)
    return _tower(vlm, whole, 1), MlpConnector(kind="mlp", weights=vlm.name), "causal"


LAYOUT = Layout(
    r"^(?:model\.)?vision_tower\.",
    r"^(?:model\.)?multi_modal_projector\.",
    {
        r"^language_model\.lm_head\.": "lm_head.",
        r"^(?:model\.)?language_model\.(?:{base}\.)?": "{base}.",
    },
    {
        "patch_merger.merging_layer.": "merging.",
        "linear_1.": "layers.0.",
        "linear_2.": "layers.2.",
    },
)
MISTRAL3 = Family(
    "Mistral 3",
    ("mistral3",),
    LAYOUT,
    _mistral3,
    decoder_config,
    MODULES
    | {
        "connector.norm.": "model.multi_modal_projector.norm.",
        "connector.merging.": "model.multi_modal_projector.patch_merger.merging_layer.",
    },
)
PIXTRAL = Family("Pixtral", ("pixtral",), LAYOUT, _pixtral, decoder_config, MODULES)
