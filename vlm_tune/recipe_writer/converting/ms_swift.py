"""Configurations of ms-swift: YAML, a script with `swift sft`, or a run's `args.json`."""

from __future__ import annotations

from typing import Any

from vlm_tune.recipe_writer.converting.conversion import Conversion, WhatTrains, set_rules
from vlm_tune.recipe_writer.converting.models import (
    OPENGVLAB,
    REMOTE,
    TEXT,
    lora_rule,
    set_model,
)
from vlm_tune.recipe_writer.converting.objectives import set_dpo, set_grpo
from vlm_tune.recipe_writer.converting.pixels import set_pixels
from vlm_tune.recipe_writer.converting.sources import (
    set_max_length,
    set_packing,
    set_sources,
    source_of,
)
from vlm_tune.recipe_writer.converting.trainer import Defaults, convert_trainer, refuse_left

MARKERS = {
    "aligner_lr", "attn_impl", "freeze_aligner", "freeze_vit", "model", "model_id_or_path",
    "model_type", "rlhf_type", "sft_type", "split_dataset_ratio", "target_modules", "train_type",
    "truncation_strategy", "tuner_type", "val_dataset", "vit_lr",
}  # fmt: skip
"""Keys by which a configuration is known."""

MODEL_TYPES = {
    "gemma3_vision": "gemma3",
    "gemma3n": "gemma3n",
    "gemma4": "gemma4",
    "glm4_1v": "glm4v",
    "glm4_5v": "glm4v_moe",
    "glm4v": "glm4v",
    "glm4v_moe": "glm4v_moe",
    "glm_ocr": "glm_ocr",
    "got_ocr2_hf": "got_ocr2",
    "hunyuan_ocr": "hunyuan_vl",
    "idefics3": "idefics3",
    **dict.fromkeys(("internvl", "internvl_hf", "internvl_gpt_hf"), "internvl"),
    **dict.fromkeys(
        (
            "internvl2", "internvl2_5", "internvl2_phi3", "internvl3", "internvl3_5",
            "internvl3_5_gpt", "internvl_chat", "internvl_phi3",
        ),
        OPENGVLAB,
    ),
    "llama3_2_vision": "mllama",
    "llama4": "llama4",
    **dict.fromkeys(("llava1_5_hf", "llava_llama3_1_hf", "llava_llama3_hf"), "llava"),
    **dict.fromkeys(
        (
            "llama3_llava_next_hf", "llava1_6_mistral_hf", "llava1_6_vicuna_hf", "llava1_6_yi_hf",
            "llava_next_qwen_hf",
        ),
        "llava_next",
    ),
    **dict.fromkeys(("llava_next_video_hf", "llava_next_video_yi_hf"), "llava_next_video"),
    "llava_onevision_hf": "llava_onevision",
    "mimo_vl": "qwen2_5_vl",
    **dict.fromkeys(("mistral3", "mistral3_2506", "mistral_2503", "mistral_2506"), "mistral3"),
    "paddle_ocr": "paddleocr_vl",
    "paligemma": "paligemma",
    "pixtral": "pixtral",
    "qvq": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen2_vl": "qwen2_vl",
    "qwen3_5": "qwen3_5",
    "qwen3_5_moe": "qwen3_5_moe",
    "qwen3_moe_vl": "qwen3_vl_moe",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl_moe",
    **dict.fromkeys(
        (
            "chatglm4v", "cogvlm2", "deepseek_janus", "deepseek_janus_pro", "deepseek_ocr",
            "deepseek_vl", "deepseek_vl2", "dots_ocr", "emu3_chat", "florence", "glm_edge_v",
            "got_ocr2", "interns1", "keye_vl", "keye_vl_1_5", "kimi_vl", "llama3_llava_next",
            "llava1_6_mistral", "llava1_6_yi", "llava_next_qwen", "llava_onevision1_5", "minicpmo",
            "minicpmo2_6", "minicpmv", "minicpmv2_5", "minicpmv2_6", "minicpmv4", "minicpmv4_5",
            "molmo", "mplug_owl3", "ovis1_6", "ovis1_6_llama3", "ovis2", "ovis2_5", "phi3_vision",
            "phi4_multimodal", "qwen2_5_omni", "qwen3_omni", "qwen3_omni_moe", "qwen_vl",
            "sail_vl2", "valley", "xcomposer2", "xcomposer2_4khd", "xcomposer2_5", "yi_vl",
        ),
        REMOTE,
    ),
}  # fmt: skip
"""transformers' model types by ms-swift's of vision-language models; others are of LLMs."""
MODEL_TEMPLATES = {
    "llama3_llava_next_hf": "llama3",
    "llava1_6_mistral_hf": "llava_mistral",
    "llava1_6_yi_hf": "chatml",
    "llava_llama3_1_hf": "llama3",
    "llava_llama3_hf": "llama3",
    "llava_next_qwen_hf": "chatml",
}
"""Our chat formats by ms-swift's model types of families whose models have several."""
TEMPLATES = {"qwen": "chatml", "chatml": "chatml", "qwen2_5": "chatml", "llama3": "llama3"}
"""Our names of templates."""

QUIET = {
    "attn_impl", "add_version", "check_model", "ckpt_dir", "create_checkpoint_symlink",
    "dataset_num_proc", "dataset_shuffle", "device_map", "download_mode", "enable_cache",
    "global_world_size", "hub", "ignore_args_error", "interleave_prob",
    "load_args", "load_data_args", "load_from_cache_file", "local_repo_path",
    "local_world_size", "loss_type", "lora_bias", "lora_dtype", "bnb_4bit_compute_dtype",
    "bnb_4bit_use_double_quant", "model_dir", "model_info", "model_meta", "model_suffix",
    "output_dir_postfix", "padding_free", "padding_side", "predict_with_generate", "quant_method",
    "rank", "stream", "stopping_strategy", "strict", "swift_version",
    "template_backend", "train_dataloader_shuffle", "training_args", "tuner_backend", "use_hf",
    "use_swift_lora", "val_dataset_shuffle", "vit_gradient_checkpointing",
    "metric_for_best_model", "use_chat_template", "metric",
    "router_aux_loss_coef", "hub_private_repo", "model_author", "model_name", "num_beams",
    "temperature", "repetition_penalty", "dataset_kwargs",
    "logprobs", "problem_type", "lazy_tokenize", "log_completions", "offload_model",
    "offload_optimizer", "sleep_level", "use_vllm",
}  # fmt: skip
PREFIXES = (
    "adalora_", "boft_", "fourier_", "galore_", "lisa_", "llamapro_", "lora_ga_", "reft_", "vera_",
    "vllm_", "sglang_", "lmdeploy_", "ray_", "eval_", "packing_", "hqq_", "optim_target",
)  # fmt: skip
"""Settings of other tuners and of servers, which `args.json` writes out for every run."""

USUAL = {
    "deepspeed_autotp_size": 1,
    "loss_scale": "default",
    "sequence_parallel_size": 1,
    "shuffle_buffer_size": 1000,
}
"""Defaults that `args.json` writes out for every run."""

REASONS = {
    "MAX_PIXELS": "a tower reads images of one size: model.tower.image_size, and tiles for larger",
    "MIN_PIXELS": "a tower reads images of one size: model.tower.image_size",
    "VIDEO_MAX_PIXELS": "model.video_max_pixels bounds the videos of a native model that knows "
    "videos; others take frames as images, as large as these",
    "FPS_MAX_FRAMES": "a source's video_frames says how many frames are read",
    "adapters": "merge the adapter first, and name the merged model",
    "agent_template": "rows with tools are refused: no chat format here renders them",
    "custom_register_path": "code is never run; docs/data.md lists the forms of rows",
    "external_plugins": "code is never run",
    "freeze_parameters": "name the parameters in a rule of their own: tune, how: frozen",
    "freeze_parameters_ratio": "how: last_layers in a rule of `tune` trains the last blocks",
    "loss_scale": "all answers weigh the same; rows give turns `weight: 0`",
    "max_pixels": "a tower reads images of one size: model.tower.image_size, and tiles for larger",
    "min_pixels": "a tower reads images of one size: model.tower.image_size",
    "model_kwargs": "these are settings of one model, and no key of a recipe is known for them",
    "modules_to_save": "name the parameters in a rule of their own: tune, how: full",
    "num_labels": "answers are text, also in classification",
    "rope_scaling": "the LLM's positions stay as they are",
    "sequence_parallel_size": "a row is on one device",
    "target_regex": "a rule of `tune` matches by globs, and target_modules by names",
    "trainable_parameters": "name the parameters in a rule of their own: tune, how: full",
    "use_galore": "AdamW is the only optimizer here",
}


def convert(conversion: Conversion) -> None:
    """Converts a configuration of ms-swift."""
    arguments = conversion.arguments
    kind = arguments.text("tuner_type", "train_type", "sft_type") or "lora"
    bits = arguments.count("quant_bits")
    if bits not in (None, 4, 8):
        arguments.refuse("quant_bits", bits, "weights are packed in 4 or 8 bit")
    fp4 = arguments.text("bnb_4bit_quant_type") == "fp4"
    model_type = arguments.text("model_type")
    template = arguments.text("template")
    name = arguments.text("model", "model_id_or_path")
    new = set_model(
        conversion,
        "model",
        name,
        declared=_declared(model_type, name) if model_type else None,
        template=MODEL_TEMPLATES.get(model_type or "") or TEMPLATES.get(template or ""),
        quantize={4: "fp4" if fp4 else "nf4", 8: "int8"}.get(bits or 0),
    )
    _set_objective(conversion)
    set_pixels(conversion, "min_pixels", "MIN_PIXELS", "min_pixels")
    set_pixels(conversion, "max_pixels", "MAX_PIXELS", "max_pixels")
    _set_data(conversion)
    _set_tokens(conversion)
    usual = Defaults(
        batch=1,
        accumulation=16,
        learning_rate=1e-5 if kind == "full" else 1e-4,
        weight_decay=0.1,
        beta2=0.95,
        schedule="cosine",
        checkpointing=True,
    )
    convert_trainer(conversion, usual)
    _set_tuning(conversion, kind, new)
    task = arguments.text("task_type")
    if task not in (None, "causal_lm"):
        reason = "a recipe trains answers in text, also in classification, and no other head"
        raise arguments.unsupported("task_type", task, reason)
    refuse_left(conversion, QUIET, REASONS, PREFIXES, USUAL)


def _set_objective(conversion: Conversion) -> None:
    """Sets the objective of `swift rlhf`."""
    arguments = conversion.arguments
    kind = arguments.text("rlhf_type")
    if kind is None:
        return
    if kind not in ("dpo", "kto", "simpo", "orpo", "grpo"):
        reason = "those that become a recipe are dpo, kto, simpo, orpo and grpo"
        raise arguments.unsupported("rlhf_type", kind, reason)
    if kind == "grpo":
        usual = {"beta": 0.04, "temperature": 0.9, "loss_type": "grpo"}
        set_grpo(conversion, "rlhf_type", usual)
        return
    beta = arguments.number("beta") or (2.0 if kind == "simpo" else 0.1)
    losses = arguments.names("loss_type")
    if kind == "dpo":
        weights = arguments.numbers("loss_weights") or [1.0] * len(losses)
        by_name = dict(zip(losses or ["sigmoid"], weights or [1.0], strict=False))
        share = arguments.number("rpo_alpha")
        set_dpo(conversion, "rlhf_type", beta, by_name | ({"sft": share} if share else {}))
        return
    objective: dict[str, Any] = {"kind": kind, "beta": beta}
    if kind == "kto":
        objective["desirable_weight"] = arguments.number("desirable_weight") or 1.0
        objective["undesirable_weight"] = arguments.number("undesirable_weight") or 1.0
    elif kind == "simpo":
        margin = arguments.number("simpo_gamma")
        share = arguments.number("cpo_alpha")
        objective["simpo_gamma"] = 1.0 if margin is None else margin
        objective["cpo_alpha"] = 1.0 if share is None else share
    conversion.set("objective", objective, "rlhf_type")


def _declared(model_type: str, name: str | None) -> str:
    """The model type of transformers that ms-swift's stands for, as `set_model` takes it.

    The names of InternVL checkpoints in transformers' layout end in -hf.
    """
    declared = MODEL_TYPES.get(model_type, TEXT)
    if declared == OPENGVLAB and name is not None and name.lower().endswith("-hf"):
        return "internvl"
    return declared


def _set_tokens(conversion: Conversion) -> None:
    """Adds special tokens to the vocabulary; ms-swift takes them from a text file too."""
    arguments = conversion.arguments
    tokens = arguments.names("new_special_tokens")
    if tokens and conversion.native:
        reason = "a native model keeps its vocabulary"
        arguments.refuse("new_special_tokens", tokens, reason)
    elif any(name.endswith(".txt") for name in tokens):
        reason = "model.llm.added_special_tokens takes the tokens, and no file"
        arguments.refuse("new_special_tokens", tokens, reason)
    elif tokens:
        llm = {**conversion.draft.values.get("model.llm", {}), "added_special_tokens": tokens}
        conversion.set("model.llm", llm, "quant_bits and new_special_tokens")


def _set_data(conversion: Conversion) -> None:
    arguments = conversion.arguments
    columns = _columns(conversion)
    for part, key in (("train", "dataset"), ("validation", "val_dataset")):
        names = arguments.take(key) or []
        names = names if isinstance(names, list) else str(names).split()
        set_sources(conversion, part, [_source(str(name)) | columns for name in names], key)
    share = arguments.number("split_dataset_ratio")
    if share and "data.validation" not in conversion.draft.values:
        conversion.set("data.split", {"validation": share}, "split_dataset_ratio")
    set_max_length(conversion, "max_length", 2048)
    strategy = arguments.text("truncation_strategy") or "delete"
    overlong = "drop" if strategy == "delete" else "split" if strategy == "split" else "trim"
    conversion.draft.set("data.overlong", overlong, f"from truncation_strategy: {strategy}")
    set_packing(conversion, arguments.flag("packing"))
    if arguments.flag("streaming"):
        conversion.set("data.streaming", True, "streaming")
    system = arguments.text("system")
    if system and system.endswith(".txt"):
        arguments.refuse("system", system, "data.system is the text itself, and no file's name")
    elif system:
        conversion.set("data.system", system, "system")


def _source(name: str) -> dict[str, Any]:
    """A source for `path_or_id:subset#count`."""
    name, _, count = name.partition("#")
    if name[:4].lower() in ("hf::", "ms::"):
        name = name[4:]
    source = source_of(name)
    if source["kind"] == "dataset" and ":" in name:
        source["name"], _, source["config"] = name.partition(":")
    if count.isdecimal():
        source["limit"] = int(count)
    return source


OURS = {"query": "prompt", "response": "completion", "system": "system", "images": "images"}
"""Our names of ms-swift's columns."""


def _columns(conversion: Conversion) -> dict[str, Any]:
    """`columns` of the sources; ms-swift gives the rows' own names first."""
    columns = conversion.arguments.take("columns")
    if not isinstance(columns, dict):
        return {}
    ours = {OURS.get(str(name), str(name)): theirs for theirs, name in columns.items()}
    return {"columns": ours}


def _set_tuning(conversion: Conversion, kind: str, new_connector: bool) -> None:
    arguments = conversion.arguments
    if kind not in ("lora", "full"):
        arguments.refuse("tuner_type", kind, "adapters are LoRA here; the recipe takes LoRA")
    trains = WhatTrains(
        method="full" if kind == "full" else "lora",
        tower=not arguments.flag("freeze_vit", True),
        connector=not arguments.flag("freeze_aligner", True),
        llm=not arguments.flag("freeze_llm"),
        lora=_lora(conversion),
        tower_rate=arguments.number("vit_lr"),
        connector_rate=arguments.number("aligner_lr"),
    )
    set_rules(conversion, trains, new_connector=new_connector)


def _lora(conversion: Conversion) -> dict[str, Any]:
    """The keys of a LoRA rule."""
    arguments = conversion.arguments
    rule = lora_rule(conversion, "lora_rank", "target_modules", rank=8, alpha=32)
    ratio = arguments.number("lorap_lr_ratio")
    if ratio:
        rule["lora_plus_ratio"] = ratio
    start = str(arguments.take("init_weights") or "true").lower()
    if start == "gaussian":
        rule["init"] = "gaussian"
    elif start.startswith("pissa"):
        rule["init"] = "pissa"
        iterations = start.removeprefix("pissa").removeprefix("_niter_")
        if iterations.isdecimal():
            rule["pissa_niter"] = int(iterations)
    elif start != "true":
        arguments.refuse("init_weights", start, "A is random and B zero, gaussian, or PiSSA")
    return rule
