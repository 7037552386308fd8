"""Configurations of LLaMA-Factory (`llamafactory-cli train FILE.yaml`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm_tune.errors import Problem, RecipeError
from vlm_tune.paths import is_file, is_folder, shown_path
from vlm_tune.recipe_writer.converting.arguments import Arguments
from vlm_tune.recipe_writer.converting.conversion import Conversion, WhatTrains, set_rules
from vlm_tune.recipe_writer.converting.models import REMOTE, TEXT, lora_rule, set_model
from vlm_tune.recipe_writer.converting.objectives import set_dpo
from vlm_tune.recipe_writer.converting.pixels import set_pixels
from vlm_tune.recipe_writer.converting.reading import json_value
from vlm_tune.recipe_writer.converting.sources import set_max_length, set_packing, set_sources
from vlm_tune.recipe_writer.converting.trainer import Defaults, convert_trainer, refuse_left

MARKERS = {
    "cutoff_len", "dataset_dir", "finetuning_type", "freeze_multi_modal_projector",
    "freeze_vision_tower", "image_max_pixels", "lora_target", "media_dir", "stage", "val_size",
}  # fmt: skip
"""Keys by which a configuration is known."""

VLM_TEMPLATES = {
    "ernie_vl": "ernie4_5_vl_moe",
    "gemma3": "gemma3",
    "gemma3n": "gemma3n",
    "gemma4": "gemma4",
    "glm4v": "glm4v",
    "glm4_5v": "glm4v_moe",
    "glm_ocr": "glm_ocr",
    "intern_vl": "internvl",
    "lfm2_vl": "lfm2_vl",
    "llama4": "llama4",
    "llava": "llava",
    **dict.fromkeys(
        (
            "llava_next", "llava_next_llama3", "llava_next_mistral", "llava_next_qwen",
            "llava_next_yi",
        ),
        "llava_next",
    ),
    **dict.fromkeys(
        ("llava_next_video", "llava_next_video_mistral", "llava_next_video_yi"),
        "llava_next_video",
    ),
    "mimo_vl": "qwen2_5_vl",
    "mllama": "mllama",
    "paligemma": "paligemma",
    "paligemma_chat": "paligemma",
    "pixtral": "pixtral",
    "qwen2_vl": "qwen2_vl",
    "qwen3_5": "qwen3_5",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_nothink": "qwen3_vl",
    "qvq": "qwen2_vl",
    "smolvlm": "smolvlm",
    "video_llava": "video_llava",
    **dict.fromkeys(
        (
            "dots_ocr", "intern_s1", "keye_vl", "kimi_vl", "minicpm_o", "minicpm_v", "qwen2_omni",
            "qwen3_omni", "yi_vl", "youtu_vl",
        ),
        REMOTE,
    ),
}  # fmt: skip
"""transformers' model types by the templates of vision-language models; others are of LLMs."""
TEMPLATES = {
    "llava": "vicuna",
    "llava_next": "vicuna",
    "llava_next_llama3": "llama3",
    "llava_next_mistral": "llava_mistral",
    "llava_next_qwen": "chatml",
    "llava_next_yi": "chatml",
    "vicuna": "vicuna",
    "llama3": "llama3",
    "qwen": "chatml",
    "qwen3": "chatml",
    "chatml": "chatml",
    "yi": "chatml",
}
"""Our names of templates."""
MAX_PIXELS = 768 * 768
"""LLaMA-Factory's default of `image_max_pixels`."""

QUIET = {
    "do_predict", "double_quantization", "enable_liger_kernel", "flash_attn", "low_cpu_mem_usage",
    "overwrite_cache", "plot_loss", "preprocessing_batch_size", "preprocessing_num_workers",
    "quantization_method", "tokenized_path", "upcast_layernorm", "use_fast_tokenizer",
    "use_unsloth", "use_unsloth_gc", "disable_gradient_checkpointing",
    "ignore_pad_token_for_loss", "print_param_status", "use_reentrant_gc", "pissa_convert",
    "video_max_pixels", "video_fps", "video_maxlen", "data_shared_file_system",
    "predict_with_generate", "compute_accuracy",
}  # fmt: skip
PREFIXES = ("shuffle", "swanlab_", "galore_", "apollo_", "badam_", "ppo_", "kto_", "ray_")
"""Settings of what is off: another key of the same name turns it on."""

REASONS = {
    "additional_target": "name the parameters in a rule of their own: tune, how: full",
    "adapter_name_or_path": "merge the adapter first, and name the merged model",
    "create_new_adapter": "an adapter is merged before another one is trained",
    "enable_thinking": "it is data.enable_thinking, for data.template own, if the checkpoint's "
    "template has that switch",
    "freeze_extra_modules": "name the parameters in a rule of their own: tune, how: full",
    "image_max_pixels": "a tower reads images of one size: model.tower.image_size, and tiles for "
    "larger ones",
    "image_min_pixels": "a tower reads images of one size: model.tower.image_size",
    "mask_history": "give turns that are context `weight: 0` in the rows",
    "dpo_label_smoothing": "the smoothed loss is loss_type robust or exo_pair, which differ",
    "ref_model": "the reference is the model before training",
    "ref_model_adapters": "the reference is the model before training",
    "rope_scaling": "the LLM's positions stay as they are",
    "tool_format": "rows with tools are refused: no chat format here renders them",
    "train_on_prompt": "questions carry no loss here",
    "use_badam": "AdamW is the only optimizer here",
    "use_galore": "AdamW is the only optimizer here",
    "use_apollo": "AdamW is the only optimizer here",
    "use_llama_pro": "no blocks are added to the LLM",
    "use_swanlab": "the trackers are tensorboard, wandb, mlflow and trackio",
    "freeze_trainable_modules": "the last blocks train as a whole",
    "shift_attn": "attention is the model's own",
}


def convert(conversion: Conversion) -> None:
    """Converts a configuration of LLaMA-Factory."""
    arguments = conversion.arguments
    stage = arguments.text("stage") or "sft"
    if stage not in ("sft", "pt", "dpo", "kto"):
        reason = "the stages that become a recipe are sft, pt, dpo and kto"
        raise arguments.unsupported("stage", stage, reason)
    if stage in ("dpo", "kto"):
        _set_objective(conversion, stage)
    template = arguments.text("template")
    bits = arguments.count("quantization_bit")
    if bits not in (None, 4, 8):
        arguments.refuse("quantization_bit", bits, "weights are packed in 4 or 8 bit")
    packed = {4: "nf4", 8: "int8"}.get(bits or 0)
    kind = arguments.text("quantization_type")
    new = set_model(
        conversion,
        "model_name_or_path",
        arguments.text("model_name_or_path"),
        declared=VLM_TEMPLATES.get(template, TEXT) if template else None,
        template=TEMPLATES.get(template or ""),
        quantize="fp4" if packed == "nf4" and kind == "fp4" else packed,
    )
    if template == "paligemma_chat" and conversion.model is None:
        reason = "PaliGemma's chat format here has one question and its answer, and no turns"
        arguments.refuse("template", template, reason)
    set_pixels(conversion, "min_pixels", "image_min_pixels")
    set_pixels(conversion, "max_pixels", "image_max_pixels", default=MAX_PIXELS)
    _set_data(conversion)
    convert_trainer(conversion, Defaults(checkpointing=True))
    _set_tuning(conversion, new)
    refuse_left(conversion, QUIET, REASONS, PREFIXES)


def _set_objective(conversion: Conversion, stage: str) -> None:
    """Sets the objective of preferences."""
    arguments = conversion.arguments
    beta = arguments.number("pref_beta") or 0.1
    loss = arguments.text("pref_loss") or "sigmoid"
    if stage == "kto":
        weights = {
            "desirable_weight": arguments.number("kto_chosen_weight") or 1.0,
            "undesirable_weight": arguments.number("kto_rejected_weight") or 1.0,
        }
        conversion.set("objective", {"kind": "kto", "beta": beta, **weights}, "stage")
    elif loss == "simpo":
        gamma = arguments.number("simpo_gamma")
        margin = 0.5 if gamma is None else gamma
        objective = {"kind": "simpo", "beta": beta, "simpo_gamma": margin}
        conversion.set("objective", objective, "stage and pref_loss")
    elif loss == "orpo":
        conversion.set("objective", {"kind": "orpo", "beta": beta}, "stage and pref_loss")
    else:
        share = arguments.number("pref_ftx")
        set_dpo(conversion, "pref_loss", beta, {loss: 1.0} | ({"sft": share} if share else {}))


# --- data -----------------------------------------------------------------------------------------


def _set_data(conversion: Conversion) -> None:
    arguments = conversion.arguments
    folder = arguments.text("dataset_dir") or "data"
    media = arguments.text("media_dir")
    info = _dataset_info(folder)
    most = arguments.count("max_samples")
    weights = arguments.numbers("interleave_probs")
    strategy = arguments.text("mix_strategy") or "concat"
    for part, key in (("train", "dataset"), ("validation", "eval_dataset")):
        names = arguments.names(key)
        sources = [_source(conversion, key, name, folder, media, info) for name in names]
        for place, source in enumerate(sources):
            if most:
                source["limit"] = most
            if part == "train" and strategy != "concat" and len(weights) == len(names):
                source["weight"] = weights[place]
        set_sources(conversion, part, sources, key)
    share = arguments.number("val_size")
    if share is not None and 0 < share < 1:
        conversion.set("data.split", {"validation": share}, "val_size")
    elif share:
        reason = "what is held out is a share of the rows: data.split.validation"
        arguments.refuse("val_size", share, reason)
    set_max_length(conversion, "cutoff_len", 2048)
    conversion.draft.set(
        "data.overlong", "trim", "LLaMA-Factory cuts long rows; here only questions are cut"
    )
    set_packing(conversion, arguments.flag("packing") | arguments.flag("neat_packing"))
    if arguments.flag("streaming"):
        conversion.set("data.streaming", True, "streaming")
        buffer = arguments.count("buffer_size")
        if buffer:
            conversion.set("data.shuffle_buffer", buffer, "buffer_size")
    system = arguments.text("default_system")
    if system:
        conversion.set("data.system", system, "default_system")


def _dataset_info(folder: str) -> dict[str, Any]:
    """The descriptions of data sets in a folder, by name."""
    path = Path(folder) / "dataset_info.json"
    if not is_file(path):
        return {}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError([Problem(shown_path(path), f"can't be read as JSON: {error}")]) from None
    info = json_value(text, shown_path(path))
    if not isinstance(info, dict):
        raise RecipeError([Problem(shown_path(path), "expected an object of data sets by name")])
    return info


def _source(
    conversion: Conversion,
    key: str,
    name: str,
    folder: str,
    media: str | None,
    info: dict[str, Any],
) -> dict[str, Any]:
    """A source for a data set, as dataset_info.json describes it."""
    root = {"image_root": media} if media and Path(media) != Path(folder) else {}
    about = info.get(name)
    if not isinstance(about, dict):
        reason = f"{Path(folder) / 'dataset_info.json'} does not describe it; its file was guessed"
        conversion.arguments.refuse(key, name, reason)
        return {"kind": "file", "path": str(Path(folder) / f"{name}.json"), **root}
    described = Arguments(f"{shown_path(Path(folder) / 'dataset_info.json')}: {name}", about)
    columns = _columns(described, judged="objective" in conversion.draft.values)
    extra: dict[str, Any] = {"columns": columns} if columns else {}
    hub = described.text("hf_hub_url")
    file_name = described.text("file_name")
    if file_name:
        path = str(Path(folder) / file_name)
        if is_folder(path):
            return {"kind": "dataset", "name": path, **extra}
        return {"kind": "file", "path": path, **root, **extra}
    if hub:
        split, subset = described.text("split"), described.text("subset")
        parts = {"split": split, "config": subset}
        named = {key: value for key, value in parts.items() if value}
        return {"kind": "dataset", "name": hub, **named, **extra}
    reason = "only files and data sets of the Hugging Face hub are read"
    conversion.arguments.refuse(key, name, reason)
    return {"kind": "file", "path": str(Path(folder) / f"{name}.json"), **root}


FIELDS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "system": "system",
    "images": "images",
    "videos": "videos",
    "tools": "tools",
    "kto_tag": "label",
    "chosen": "chosen",
    "rejected": "rejected",
}
"""Our names of LLaMA-Factory's columns."""


def _columns(described: Arguments, *, judged: bool) -> dict[str, str]:
    """Our field names with the rows' own, where these differ; `judged` rows are preferences."""
    role_tag = described.section("tags").text("role_tag")
    turns = "messages" if role_tag == "role" else "conversations"
    columns = described.section("columns")
    fields = {**FIELDS, "messages": turns}
    usual: dict[str, str] = {}
    if judged and described.text("formatting") in (None, "alpaca"):
        fields |= {"prompt": "prompt", "response": "completion"}
        usual = {"prompt": "instruction", "response": "output"}
    names = {ours: columns.text(column) or usual.get(column) for column, ours in fields.items()}
    return {ours: name for ours, name in names.items() if name and name != ours}


# --- what trains ----------------------------------------------------------------------------------


def _set_tuning(conversion: Conversion, new_connector: bool) -> None:
    arguments = conversion.arguments
    kind = arguments.text("finetuning_type") or "lora"
    layers = arguments.number("freeze_trainable_layers") or 2
    if kind == "freeze" and layers < 0:
        reason = "the last blocks can train alone, and not the first; as many of them do"
        arguments.refuse("freeze_trainable_layers", int(layers), reason)
    elif kind not in ("lora", "full", "freeze"):
        arguments.refuse("finetuning_type", kind, "adapters are LoRA here; the recipe takes LoRA")
    trains = WhatTrains(
        method="full" if kind in ("full", "freeze") else "lora",
        tower=not arguments.flag("freeze_vision_tower", True),
        connector=not arguments.flag("freeze_multi_modal_projector", True),
        llm=not arguments.flag("freeze_language_model"),
        lora=_lora(conversion),
        last_layers=abs(int(layers)) if kind == "freeze" else None,
    )
    set_rules(conversion, trains, new_connector=new_connector)


def _lora(conversion: Conversion) -> dict[str, Any]:
    """The keys of a LoRA rule."""
    arguments = conversion.arguments
    rule = lora_rule(conversion, "lora_rank", "lora_target", rank=8, dropout=0.0)
    if arguments.flag("pissa_init"):
        rule["init"] = "pissa"
        iterations = arguments.number("pissa_iter")
        if iterations is None or iterations > 0:
            rule["pissa_niter"] = int(iterations or 16)
    ratio = arguments.number("loraplus_lr_ratio")
    if ratio:
        rule["lora_plus_ratio"] = ratio
    for key in ("loraplus_lr_embedding", "pissa_iter"):
        arguments.take(key)
    return rule
