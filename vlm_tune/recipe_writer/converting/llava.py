"""Training scripts of the LLaVA repository (`llava/train/train_mem.py --flag value`)."""

from __future__ import annotations

import re
from typing import Any

from vlm_tune.model.families.registry import find_vlm
from vlm_tune.recipe_writer.converting.conversion import Conversion, WhatTrains, set_rules
from vlm_tune.recipe_writer.converting.models import TEXT, lora_rule, set_model
from vlm_tune.recipe_writer.converting.sources import set_max_length, set_sources, source_of
from vlm_tune.recipe_writer.converting.trainer import Defaults, convert_trainer, refuse_left

MARKERS = {
    "data_path", "freeze_mm_mlp_adapter", "image_aspect_ratio", "image_folder", "lora_enable",
    "mm_projector_lr", "mm_projector_type", "mm_use_im_start_end", "mm_vision_select_layer",
    "model_max_length", "pretrain_mm_mlp_adapter", "tune_mm_mlp_adapter", "version",
    "vision_tower",
}  # fmt: skip
"""Keys by which a configuration is known."""

TEMPLATES = {
    "v1": "vicuna", "vicuna_v1": "vicuna", "llava_v1": "vicuna", "v1_mmtag": "vicuna",
    "plain": "vicuna", "llava_llama_3": "llama3", "llama3": "llama3",
}  # fmt: skip
"""Our names of the conversation formats; with `plain`, captions follow images without words."""

QUIET = {
    "double_quant", "group_by_modality_length", "is_multimodal", "lazy_preprocess",
    "mm_patch_merge_type", "lora_bias",
}  # fmt: skip

REASONS = {
    "lora_weight_path": "merge the adapter first, and name the merged model",
    "mm_use_im_patch_token": "image slots are no tokens of the vocabulary here",
    "mm_use_im_start_end": "no tokens stand before and after an image",
    "mpt_attn_impl": "attention is the model's own: model.llm.attention",
}


def convert(conversion: Conversion) -> None:
    """Converts the arguments of a LLaVA training script."""
    arguments = conversion.arguments
    bits = arguments.count("bits") or 16
    version = arguments.text("version")
    kind = arguments.text("quant_type") or "nf4"
    name = arguments.text("model_name_or_path")
    _set_tower(conversion, name)
    set_model(
        conversion,
        "model_name_or_path",
        name,
        declared=TEXT if "model.tower" in conversion.draft.values else "llava",
        template=TEMPLATES.get(version or "v1"),
        quantize={4: kind, 8: "int8"}.get(bits),
    )
    if version not in (None, *TEMPLATES):
        arguments.refuse("version", version, "no chat format is known for it; see data.template")
    _set_data(conversion)
    convert_trainer(conversion, Defaults())
    _set_tuning(conversion)
    refuse_left(conversion, QUIET, REASONS)


def _set_tower(conversion: Conversion, model: str | None) -> None:
    """Sets tower and connector, unless the model has them itself."""
    arguments = conversion.arguments
    tower = conversion.tower or arguments.text("vision_tower")
    kind = arguments.text("mm_projector_type") or "linear"
    layer = arguments.number("mm_vision_select_layer")
    features = arguments.text("mm_vision_select_feature")
    weights = arguments.text("pretrain_mm_mlp_adapter")
    aspect = arguments.text("image_aspect_ratio") or "square"
    whole = conversion.model is not None or tower is None
    if whole or (model is not None and find_vlm(model) is not None):
        return
    section: dict[str, Any] = {"kind": "transformers", "name": tower}
    section["layer"] = -1 if layer is None else int(layer)
    if features == "cls_patch":
        section["class_token"] = True
    if aspect == "pad":
        section["resize"] = "pad"
    elif aspect == "anyres":
        section["tiles"] = [[1, 2], [2, 1], [2, 2], [1, 3], [3, 1]]
    conversion.set("model.tower", section, "vision_tower, mm_vision_select_layer and the like")
    connector = _connector(conversion, kind)
    if weights and weights.endswith(".safetensors"):
        connector["weights"] = weights
    elif weights:
        reason = (
            "weights are read from safetensors only: save the projector as one, and name it in "
            "model.connector.weights"
        )
        arguments.refuse("pretrain_mm_mlp_adapter", weights, reason)
    conversion.set("model.connector", connector, "mm_projector_type")


def _connector(conversion: Conversion, kind: str) -> dict[str, Any]:
    layers = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if layers is not None and int(layers[1]) >= 2:
        return {"kind": "mlp", "depth": int(layers[1])}
    if kind not in ("linear", "mlp1x_gelu"):
        reason = "the connectors are listed in docs/model.md; a linear one is taken"
        conversion.arguments.refuse("mm_projector_type", kind, reason)
    return {"kind": "linear"}


def _set_data(conversion: Conversion) -> None:
    arguments = conversion.arguments
    path = arguments.text("data_path")
    images = arguments.text("image_folder")
    root = {"image_root": images} if images else {}
    sources = [source_of(path) | root] if path else []
    set_sources(conversion, "train", sources, "data_path and image_folder")
    set_max_length(conversion, "model_max_length", 512)
    conversion.draft.set("data.overlong", "trim", "LLaVA cuts long rows; here only questions are")


def _set_tuning(conversion: Conversion) -> None:
    arguments = conversion.arguments
    projector_alone = arguments.flag("tune_mm_mlp_adapter")
    lora = arguments.flag("lora_enable")
    trains = WhatTrains(
        method="lora" if lora else "full",
        tower=arguments.flag("unfreeze_mm_vision_tower"),
        connector=projector_alone or not arguments.flag("freeze_mm_mlp_adapter"),
        llm=not projector_alone and not arguments.flag("freeze_backbone"),
        lora=lora_rule(conversion, "lora_r", rank=64, alpha=16),
        connector_by_lora=False,
        connector_rate=arguments.number("mm_projector_lr"),
    )
    set_rules(conversion, trains, new_connector=False)
