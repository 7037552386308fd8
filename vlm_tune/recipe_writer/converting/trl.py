"""Configurations of TRL: the keys of ScriptArguments, ModelConfig, and a trainer's own config.

The trainer is SFTTrainer, DPOTrainer, KTOTrainer or GRPOTrainer: its keys tell which.
"""

from __future__ import annotations

from typing import Any

from vlm_tune.recipe_writer.converting.conversion import Conversion, WhatTrains, set_rules
from vlm_tune.recipe_writer.converting.models import lora_rule, set_model
from vlm_tune.recipe_writer.converting.objectives import set_dpo, set_grpo
from vlm_tune.recipe_writer.converting.reading import TRAINER
from vlm_tune.recipe_writer.converting.sources import (
    set_max_length,
    set_packing,
    set_sources,
    source_of,
)
from vlm_tune.recipe_writer.converting.trainer import Defaults, convert_trainer, refuse_left

MARKERS = {
    "assistant_only_loss", "completion_only_loss", "dataset_config", "dataset_name",
    "dataset_test_split", "dataset_text_field", "dataset_train_split", "load_in_4bit",
    "load_in_8bit", "lora_r", "lora_target_modules", "max_seq_length", "use_peft",
}  # fmt: skip
"""Keys by which a configuration is known."""
OF_GRPO = ("num_generations", "reward_funcs", "max_completion_length")
OF_KTO = ("desirable_weight", "undesirable_weight")
OF_DPO = ("beta", "precompute_ref_log_probs", "max_prompt_length")
"""Keys by which the trainer of a configuration is known; SFTTrainer has none of them."""
TRAINERS = ("dpo", "kto", "grpo")

QUIET = {
    "attn_implementation", "assistant_only_loss", "bnb_4bit_quant_storage", "completion_only_loss",
    "dataset_kwargs", "dataset_num_proc", "dataset_text_field", "eval_packing", "lora_task_type",
    "model_revision", "packing_strategy", "pad_to_multiple_of", "padding_free", "shuffle_dataset",
    "truncation_mode", "use_bnb_nested_quant", "ignore_bias_buffers",
    "lora_target_parameters", "pad_token", "activation_offloading", "loss_type",
}  # fmt: skip

REASONS = {
    "chat_template_path": "data.template names a chat format of our own kind (docs/data.md)",
    "eos_token": "the chat format says what ends an answer",
    "lora_modules_to_save": "name the parameters in a rule of their own: tune, how: full",
    "model_init_kwargs": "the recipe's own keys say how a model is loaded",
    "router_aux_loss_coef": "the loss is plain cross-entropy",
}


def convert(conversion: Conversion) -> None:
    """Converts a configuration of TRL."""
    arguments = conversion.arguments
    four = arguments.flag("load_in_4bit")
    eight = arguments.flag("load_in_8bit")
    kind = arguments.text("bnb_4bit_quant_type") or "nf4"
    new = set_model(
        conversion,
        "model_name_or_path",
        arguments.text("model_name_or_path", "model_name"),
        quantize=kind if four else "int8" if eight else None,
    )
    _set_objective(conversion)
    _set_data(conversion)
    usual = Defaults(learning_rate=2e-5, checkpointing=True)
    convert_trainer(conversion, usual)
    lora = arguments.flag("use_peft") or "lora_r" in arguments or four or eight
    rule = lora_rule(conversion, "lora_r", "lora_target_modules", rank=16, alpha=32)
    # TRL tunes a model as a whole: PEFT's all-linear takes the tower's layers too.
    whole = not lora or (rule["target_modules"] == "all-linear" and not new)
    trains = WhatTrains(
        method="lora" if lora else "full",
        tower=whole,
        connector=whole,
        lora=rule,
    )
    set_rules(conversion, trains, new_connector=new)
    refuse_left(conversion, QUIET, REASONS)


def _set_objective(conversion: Conversion) -> None:
    """Sets the objective of a trainer other than SFTTrainer: of the one named, or by its keys."""
    arguments = conversion.arguments
    named = arguments.text(TRAINER)
    if named not in (None, *TRAINERS):
        reason = f"the trainers of TRL that become a recipe are sft, {', '.join(TRAINERS)}"
        raise arguments.unsupported("trainer", named, reason)
    if named == "grpo" or (named is None and any(key in arguments for key in OF_GRPO)):
        set_grpo(conversion, "the keys of GRPOConfig", {})
        return
    kto = named == "kto" or (named is None and any(key in arguments for key in OF_KTO))
    if not kto and named != "dpo" and not any(key in arguments for key in OF_DPO):
        return
    beta = arguments.number("beta") or 0.1
    if kto:
        weights = {key: arguments.number(key) or 1.0 for key in OF_KTO}
        conversion.set("objective", {"kind": "kto", "beta": beta, **weights}, "its weights")
        return
    losses = arguments.names("loss_type") or ["sigmoid"]
    weights = arguments.numbers("loss_weights") or [1.0] * len(losses)
    set_dpo(conversion, "the keys of DPOConfig", beta, dict(zip(losses, weights, strict=False)))


def _set_data(conversion: Conversion) -> None:
    arguments = conversion.arguments
    name = arguments.text("dataset_name")
    config = arguments.text("dataset_config")
    train = arguments.text("dataset_train_split") or "train"
    test = arguments.text("dataset_test_split")
    streamed = arguments.flag("dataset_streaming") | arguments.flag("streaming")
    mixture = arguments.take("datasets")
    sources = [] if name is None else [_source(name, config, train)]
    if isinstance(mixture, list):
        sources += [
            _source(str(each.get("path")), each.get("name"), each.get("split") or "train")
            for each in mixture
            if isinstance(each, dict)
        ]
    set_sources(conversion, "train", sources, "dataset_name")
    if name is not None and test and sources[0]["kind"] == "dataset":
        scored = [_source(name, config, test)]
        set_sources(conversion, "validation", scored, "dataset_test_split")
    key = "max_seq_length" if "max_seq_length" in arguments else "max_length"
    set_max_length(conversion, key, 1024)
    conversion.draft.set("data.overlong", "trim", "TRL cuts long rows; here only questions are cut")
    set_packing(conversion, arguments.flag("packing"))
    if streamed:
        conversion.set("data.streaming", True, "dataset_streaming")


def _source(name: str, config: str | None, split: str) -> dict[str, Any]:
    source = source_of(name)
    if source["kind"] == "dataset":
        source |= {"split": split} | ({"config": config} if config else {})
    return source
