"""LLaVA-1.5, in transformers' layout and in the LLaVA repository's."""

from __future__ import annotations

import re
from typing import Any

from vlm_tune.config.connectors import LinearConnector, MlpConnector
from vlm_tune.config.towers import TransformersTower
from vlm_tune.model.families.base import (
    Family,
    Layout,
    Vlm,
    VlmParts,
    counted_layers,
    decoder_config,
    refuse,
    square_images,
    tensor_names,
    whole_config,
)

ORIGINAL_TYPES = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
}
"""transformers' model types of the language models, by the LLaVA repository's model types."""


def _llava(vlm: Vlm) -> VlmParts:
    """The parts of a LLaVA-1.5 in transformers' layout; unsupported variants raise `ModelError`."""
    whole = whole_config(vlm)
    vision = whole.vision_config
    strategy = whole.vision_feature_select_strategy
    bias = getattr(whole, "multimodal_projector_bias", True)
    act = whole.projector_hidden_act
    if act not in ("gelu", "linear"):
        refuse(vlm, f"a projector with {act} (projector_hidden_act)", "gelu")
    if act == "linear" and not bias:
        refuse(vlm, "a linear projector without biases (multimodal_projector_bias)", "biases")
    has_class = vision.model_type == "clip_vision_model"
    if not has_class and strategy == "default":
        refuse(
            vlm,
            "all patches but the first of a tower without a class token "
            "(vision_feature_select_strategy)",
            "full",
        )
    connector = (
        LinearConnector(kind="linear", weights=vlm.name)
        if act == "linear"
        else MlpConnector(kind="mlp", bias=bias, weights=vlm.name)
    )
    tower = TransformersTower(
        kind="transformers",
        name=vlm.name,
        layer=counted_layers(vlm, vision.num_hidden_layers),
        class_token=has_class and strategy == "full",
        **square_images(vlm, vision.image_size),
    )
    return tower, connector, "causal"


def _llava_original(vlm: Vlm) -> VlmParts:
    """The parts of a LLaVA-1.5 in the LLaVA repository's layout, as `_llava`."""
    config = vlm.config
    projector = str(config.get("mm_projector_type", "linear"))
    shape = config.get("image_aspect_ratio") or "square"
    mlp = re.fullmatch(r"mlp(\d+)x_gelu", projector)
    connector: Any = None
    if projector == "linear":
        connector = LinearConnector(kind="linear", weights=vlm.name)
    elif mlp and int(mlp[1]) > 1:
        connector = MlpConnector(kind="mlp", depth=int(mlp[1]), weights=vlm.name)
    else:
        refuse(vlm, f"a projector of type {projector} (mm_projector_type)", "linear or mlp2x_gelu")
    if shape not in ("square", "pad"):
        refuse(vlm, f"images of image_aspect_ratio {shape}", "LLaVA-1.5's square or pad")
    if config.get("mm_use_im_start_end") or config.get("mm_use_im_patch_token"):
        refuse(
            vlm,
            "tokens around an image (mm_use_im_start_end, mm_use_im_patch_token)",
            "none, as in LLaVA-1.5",
        )
    tower = TransformersTower(
        kind="transformers",
        name=str(config["mm_vision_tower"]),
        weights=vlm.name
        if any(re.match(vlm.layout.tower, key) for key in tensor_names(vlm))
        else None,
        layer=int(config.get("mm_vision_select_layer", -2)),
        class_token=config.get("mm_vision_select_feature", "patch") == "cls_patch",
        resize="pad" if shape == "pad" else "crop",
    )
    return tower, connector, "causal"


def _language_original(vlm: Vlm) -> Any:
    from transformers import AutoConfig

    kind = ORIGINAL_TYPES[vlm.config["model_type"]]
    known = {*AutoConfig.for_model(kind).to_dict(), "rope_theta", "rope_scaling"} - {
        "model_type",
        "architectures",
        "transformers_version",
    }
    return AutoConfig.for_model(
        kind, **{key: value for key, value in vlm.config.items() if key in known}
    )


MODULES = {
    "model.": "model.language_model.",
    "lm_head.": "lm_head.",
    "connector.layers.0.": "model.multi_modal_projector.linear_1.",
    "connector.layers.2.": "model.multi_modal_projector.linear_2.",
}
LLAVA = Family(
    "LLaVA-1.5",
    ("vicuna",),
    Layout(
        r"^(?:model\.)?vision_tower\.(?:vision_model\.)?",
        r"^(?:model\.)?multi_modal_projector\.",
        {
            r"^language_model\.lm_head\.": "lm_head.",
            r"^(?:model\.)?language_model\.(?:{base}\.)?": "{base}.",
        },
    ),
    _llava,
    decoder_config,
    MODULES,
)
LLAVA_ORIGINAL = Family(
    "LLaVA-1.5",
    ("vicuna",),
    Layout(
        r"^model\.vision_tower\.vision_tower\.(?:vision_model\.)?", r"^model\.mm_projector\.", {}
    ),
    _llava_original,
    _language_original,
)
