"""Checks for tuning rules of a recipe that contradict themselves, each other or the model."""

from __future__ import annotations

import fnmatch
import typing
from collections.abc import Sequence
from typing import Any

from vlm_tune.config.faults import Fault, broken
from vlm_tune.config.tune import TuneRule, written_rules
from vlm_tune.config.yaml_source import value_at
from vlm_tune.quoting import quoted

BLOCK_WEIGHTS = (
    "llm.model.layers.0.self_attn.q_proj.weight",
    "llm.model.language_model.layers.0.self_attn.q_proj.weight",
    "llm.model.decoder.layers.0.self_attn.q_proj.weight",
    "llm.transformer.h.0.attn.c_attn.weight",
    "llm.encoder.block.0.layer.0.SelfAttention.q.weight",
)
"""Names of a linear layer of a block in different families of LLMs."""
PARTS = ("llm", "tower", "connector")
LORA = ("lora",)
RULE_KEYS = {
    "r": LORA,
    "lora_alpha": LORA,
    "lora_dropout": LORA,
    "target_modules": LORA,
    "variant": LORA,
    "init": LORA,
    "pissa_niter": LORA,
    "lora_plus_ratio": LORA,
    "sharing": LORA,
    "tie": LORA,
    "shared_layers": LORA,
    "layers": ("last_layers",),
    "layer_decay": ("full", "last_layers"),
    "tokens": ("prompt", "prefix"),
}
"""Keys of a tuning rule that belong to some kinds of tuning only."""


def tune_contradictions(raw: Any) -> list[Fault]:
    """Returns faults of the tuning rules; `raw` holds unchecked values."""
    rules = written_rules(raw)
    faults = [
        (("tune", index, *path), message)
        for index, rule in enumerate(rules)
        for path, message in (
            *_rule_contradictions(rule),
            *_prompt_contradictions(raw, rule),
            *_order_contradictions(rules, index),
            *_quantized_contradictions(raw, rules, index),
        )
    ]
    return faults + broken(
        (
            rules and all(rule.get("how") == "frozen" for rule in rules),
            ("tune",),
            "every rule is frozen, nothing would train",
        )
    )


def _rule_contradictions(rule: Any) -> list[Fault]:
    """Returns faults of one rule: keys that don't belong to its `how`, its parts or each other."""
    how = rule.get("how")
    match = rule.get("match")
    known = typing.get_args(TuneRule.model_fields["how"].annotation)
    return broken(
        *(
            (
                rule.get(key) is not None and how in known and how not in owners,
                (key,),
                f"{key} belongs to how: {' or '.join(owners)}, this rule is how: {how}",
            )
            for key, owners in RULE_KEYS.items()
        ),
        (
            how == "last_layers" and rule.get("layers") is None,
            ("how",),
            "how: last_layers needs layers, the number of blocks that train",
        ),
        (
            rule.get("variant") == "dora" and rule.get("init") == "pissa",
            ("init",),
            "PiSSA over DoRA can't be saved as an adapter of the unchanged base; drop one of them",
        ),
        (
            rule.get("pissa_niter") is not None and rule.get("init") != "pissa" and how == "lora",
            ("pissa_niter",),
            "pissa_niter belongs to init: pissa",
        ),
        (
            how == "frozen" and rule.get("learning_rate") is not None,
            ("learning_rate",),
            "a frozen part has no learning rate",
        ),
        (
            how == "lora" and isinstance(match, str) and match.split(".")[0] not in PARTS,
            ("match",),
            "a LoRA rule is of one part: begin match with llm., tower. or connector.",
        ),
    )


def _prompt_contradictions(raw: Any, rule: Any) -> list[Fault]:
    """Returns faults of virtual tokens before the LLM's input, by keys of the rule."""
    how = rule.get("how")
    match = rule.get("match")
    if how not in ("prompt", "prefix"):
        return []
    return broken(
        (
            isinstance(match, str) and match.split(".")[0] != "llm",
            ("match",),
            f"virtual tokens stand before the llm's input, so how: {how} takes a rule for llm.*",
        ),
        (
            value_at(raw, "model", "connector", "kind") == "cross_attention",
            ("how",),
            f"how: {how} puts tokens before the text that the cross_attention connector does "
            "not know; use another",
        ),
        (
            how == "prefix" and value_at(raw, "train", "gradient_checkpointing") is True,
            ("how",),
            "transformers drops a prefix of keys and values where it checkpoints gradients; "
            "drop one of them",
        ),
        (
            value_at(raw, "model", "llm", "kind") == "seq2seq"
            and value_at(raw, "data", "packing") is True,
            ("how",),
            f"how: {how} puts tokens before one sample of an encoder-decoder: it takes no "
            "packed rows (data.packing)",
        ),
    )


def _order_contradictions(rules: Sequence[Any], index: int) -> list[Fault]:
    """Returns the fault of a rule that an earlier one hides, by its key."""
    match = rules[index].get("match")
    earlier = [rule["match"] for rule in rules[:index] if isinstance(rule.get("match"), str)]
    hiding = [
        each for each in earlier if isinstance(match, str) and fnmatch.fnmatchcase(match, each)
    ]
    return [
        (("match",), f"never reached: {quoted(each)} above matches first") for each in hiding[:1]
    ]


def _quantized_contradictions(raw: Any, rules: Sequence[Any], index: int) -> list[Fault]:
    """Returns faults of a rule for a quantised LLM, by keys of the rule."""
    how = rules[index].get("how")
    match = rules[index].get("match")
    if not value_at(raw, "model", "llm", "quantize"):
        return []
    of_llm = isinstance(match, str) and match.startswith("llm")
    return broken(
        (
            how in ("full", "last_layers") and _reaches_blocks(rules, index),
            ("how",),
            f"{quoted(match)} reaches the llm's layers, and quantised weights can't be "
            "trained; use how: lora for them, or drop model.llm.quantize (its embedding and "
            "head are not quantised: llm.model.embed_tokens.*, llm.lm_head.*)",
        ),
        (
            rules[index].get("init") == "pissa" and of_llm,
            ("init",),
            "PiSSA takes the singular vectors of 16-bit weights; use init: default, or drop "
            "model.llm.quantize",
        ),
    )


def _reaches_blocks(rules: Sequence[Any], index: int) -> bool:
    """Whether a rule is the first to match the linear layers of the blocks of any LLM family."""
    matches = [str(rule.get("match")) for rule in rules]
    return any(
        next((n for n, match in enumerate(matches) if fnmatch.fnmatchcase(name, match)), None)
        == index
        for name in BLOCK_WEIGHTS
    )
