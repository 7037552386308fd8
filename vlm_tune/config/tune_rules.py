"""Checks for tuning rules of a recipe that contradict themselves, each other or the model."""

from __future__ import annotations

import fnmatch
import typing
from collections.abc import Sequence
from typing import Any

from vlm_tune.config.tune import TuneRule
from vlm_tune.config.yaml_source import Path, value_at
from vlm_tune.quoting import quoted

BLOCK_WEIGHTS = (
    "llm.model.layers.0.self_attn.q_proj.weight",
    "llm.model.decoder.layers.0.self_attn.q_proj.weight",
    "llm.transformer.h.0.attn.c_attn.weight",
    "llm.encoder.block.0.layer.0.SelfAttention.q.weight",
)
"""Names of a linear layer of a block in different families of LLMs."""
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
    "layers": ("last_layers",),
    "layer_decay": ("full", "last_layers"),
    "tokens": ("prompt", "prefix"),
}
"""Keys of a tuning rule that belong to some kinds of tuning only."""


def tune_contradictions(raw: Any) -> list[tuple[Path, str]]:
    """Returns faults of the tuning rules, as (path, message); `raw` holds unchecked values."""
    faults: list[tuple[Path, str]] = []
    rules = raw.get("tune") if isinstance(raw, dict) else None
    rules = (
        [rule if isinstance(rule, dict) else {} for rule in rules]
        if isinstance(rules, list)
        else []
    )
    earlier_matches: list[str] = []
    for index, rule in enumerate(rules):
        match = rule.get("match")
        how = rule.get("how")
        faults += [(("tune", index, key), message) for key, message in _rule_contradictions(rule)]
        if how in ("prompt", "prefix"):
            faults += [
                (("tune", index, key), message)
                for key, message in _prompt_contradictions(raw, rule)
            ]
        if isinstance(match, str):
            covered = [
                earlier for earlier in earlier_matches if fnmatch.fnmatchcase(match, earlier)
            ]
            if covered:
                faults.append(
                    (
                        ("tune", index, "match"),
                        f"never reached: {quoted(covered[0])} above matches first",
                    )
                )
            earlier_matches.append(match)
        if value_at(raw, "model", "llm", "quantize"):
            faults += [
                (("tune", index, key), message)
                for key, message in _quantized_contradictions(rules, index)
            ]
    if rules and all(rule.get("how") == "frozen" for rule in rules):
        faults.append((("tune",), "every rule is frozen, nothing would train"))
    return faults


def _rule_contradictions(rule: Any) -> list[tuple[str, str]]:
    """Returns faults of one rule: keys that don't belong to its `how`, its parts or each other."""
    how = rule.get("how")
    match = rule.get("match")
    known = typing.get_args(TuneRule.model_fields["how"].annotation)
    faults = [
        (key, f"{key} belongs to how: {' or '.join(owners)}, this rule is how: {how}")
        for key, owners in RULE_KEYS.items()
        if rule.get(key) is not None and how in known and how not in owners
    ]
    if how == "last_layers" and rule.get("layers") is None:
        faults.append(("how", "how: last_layers needs layers, the number of blocks that train"))
    if rule.get("variant") == "dora" and rule.get("init") == "pissa":
        faults.append(
            (
                "init",
                "PiSSA over DoRA can't be saved as an adapter of the unchanged base; drop one of "
                "them",
            )
        )
    if rule.get("pissa_niter") is not None and rule.get("init") != "pissa" and how == "lora":
        faults.append(("pissa_niter", "pissa_niter belongs to init: pissa"))
    if how == "frozen" and rule.get("learning_rate") is not None:
        faults.append(("learning_rate", "a frozen part has no learning rate"))
    if how == "lora" and isinstance(match, str) and match.split(".")[0] not in ("llm", "tower"):
        faults.append(
            ("match", "LoRA goes on the llm or the tower; train the connector with how: full")
        )
    return faults


def _prompt_contradictions(raw: Any, rule: Any) -> list[tuple[str, str]]:
    """Returns faults of virtual tokens before the LLM's input, as (key of the rule, message)."""
    faults = []
    how = rule["how"]
    seq2seq = value_at(raw, "model", "llm", "kind") == "seq2seq"
    if isinstance(rule.get("match"), str) and rule["match"].split(".")[0] != "llm":
        faults.append(
            (
                "match",
                f"virtual tokens stand before the llm's input, so how: {how} takes a rule for "
                f"llm.*",
            )
        )
    if value_at(raw, "model", "connector", "kind") == "cross_attention":
        faults.append(
            (
                "how",
                f"how: {how} puts tokens before the text that the cross_attention connector does "
                f"not know; use another",
            )
        )
    if how == "prefix" and value_at(raw, "train", "gradient_checkpointing") is True:
        faults.append(
            (
                "how",
                "transformers drops a prefix of keys and values where it checkpoints gradients; "
                "drop one of them",
            )
        )
    if seq2seq and value_at(raw, "data", "packing") is True:
        faults.append(
            (
                "how",
                f"how: {how} puts tokens before one sample of an encoder-decoder: it takes no "
                f"packed rows (data.packing)",
            )
        )
    return faults


def _quantized_contradictions(rules: Sequence[Any], index: int) -> list[tuple[str, str]]:
    """Returns faults of a rule for a quantised LLM, as (key of the rule, message)."""
    faults = []
    how = rules[index].get("how")
    match = rules[index].get("match")
    if how in ("full", "last_layers") and _reaches_blocks(rules, index):
        message = (
            f"{quoted(match)} reaches the llm's layers, and quantised weights can't be "
            "trained; use how: lora for them, or drop model.llm.quantize (its embedding and "
            "head are not quantised: llm.model.embed_tokens.*, llm.lm_head.*)"
        )
        faults.append(("how", message))
    if rules[index].get("init") == "pissa" and isinstance(match, str) and match.startswith("llm"):
        message = (
            "PiSSA takes the singular vectors of 16-bit weights; use init: default, or drop "
            "model.llm.quantize"
        )
        faults.append(("init", message))
    return faults


def _reaches_blocks(rules: Sequence[Any], index: int) -> bool:
    """Whether a rule is the first to match the linear layers of the blocks of any LLM family."""
    matches = [str(rule.get("match")) for rule in rules]
    return any(
        next((n for n, match in enumerate(matches) if fnmatch.fnmatchcase(name, match)), None)
        == index
        for name in BLOCK_WEIGHTS
    )
