"""Checks for settings of objectives of several answers that contradict each other or other keys."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from vlm_tune.config.faults import Fault, broken
from vlm_tune.config.objectives import JUDGED_FORMS
from vlm_tune.config.train import FUNCTION, REWARDS
from vlm_tune.config.tune import LORA_RANK, TuneRule, adds_virtual_tokens, written_rules
from vlm_tune.config.yaml_source import value_at
from vlm_tune.quoting import quoted

SMOOTHED = ("robust", "exo_pair")
"""DPO's losses that take `label_smoothing`."""

CONTINUED = (
    "an earlier stage trains the adapters that adapter_off switches off; use "
    "reference: copy or precomputed"
)
"""What is wrong where adapters continue from an earlier stage."""


def objective_contradictions(raw: Any) -> list[Fault]:
    """Returns faults of an objective of several answers; `raw` holds unchecked values."""
    objective = value_at(raw, "objective")
    if value_at(raw, "objective", "kind") == "span_corruption":
        return _corruption_contradictions(raw)
    if not isinstance(objective, dict) or objective.get("kind") not in [*JUDGED_FORMS, "grpo"]:
        return []
    faults = [*_layout_contradictions(raw), *_reference_contradictions(raw, objective)]
    match objective["kind"]:
        case "grpo":
            return faults + _sampling_contradictions(raw, objective)
        case "dpo":
            faults += _loss_contradictions(objective)
        case "matching":
            faults += _matching_contradictions(raw)
    return faults + _judging_contradictions(raw, objective)


def _loss_contradictions(objective: dict[str, Any]) -> list[Fault]:
    """Returns faults of DPO's losses."""
    types = objective.get("loss_type", "sigmoid")
    named = isinstance(types, str | list)
    types = types if isinstance(types, list) else [types]
    weights = objective.get("loss_weights")
    smoothing = objective.get("label_smoothing", 0.0)
    return broken(
        (
            named and isinstance(weights, list) and len(weights) != len(types),
            ("objective", "loss_weights"),
            f"loss_type and loss_weights differ in length ({len(types)} and "
            f"{len(weights) if isinstance(weights, list) else 0})",
        ),
        (
            types == ["sft"],
            ("objective", "loss_type"),
            "sft alone has no preferences: name another loss beside it, or use "
            "objective.kind: language_modeling",
        ),
        (
            "exo_pair" in types and smoothing == 0,
            ("objective", "loss_type"),
            "exo_pair needs label_smoothing over 0; its paper recommends 1e-3",
        ),
        (
            smoothing != 0 and not any(name in SMOOTHED for name in types),
            ("objective", "label_smoothing"),
            f"label_smoothing needs loss_type {' and '.join(SMOOTHED)}",
        ),
    )


def _layout_contradictions(raw: Any) -> list[Fault]:
    """Returns faults of rows in which answers to one prompt can't be distinguished or joined."""
    seq2seq = value_at(raw, "model", "llm", "kind") == "seq2seq"
    reads = (
        value_at(raw, "model", "connector", "text") is True
        or value_at(raw, "model", "connector", "kind") == "fusion"
    )
    return broken(
        (
            seq2seq and adds_virtual_tokens(raw),
            ("objective", "kind"),
            "virtual tokens (how: prompt or prefix) stand before one answer of an "
            "encoder-decoder, and this objective compares several; use LoRA",
        ),
        (
            reads and not seq2seq,
            ("objective", "kind"),
            "a text-conditioned connector reads an image once per answer, and this objective "
            "compares several answers to one reading; use another connector",
        ),
    )


def _judging_contradictions(raw: Any, objective: dict[str, Any]) -> list[Fault]:
    """Returns faults of an objective of preferences beside the data and the evaluation."""
    seq2seq = value_at(raw, "model", "llm", "kind") == "seq2seq"
    estimates = objective["kind"] == "kto" and objective.get("loss_type", "kto") == "kto"
    matching = objective["kind"] == "matching"
    scored_by = "answers" if matching else objective.get("scored_by", "rewards/accuracies")
    return broken(
        (
            scored_by != "answers" and value_at(raw, "evaluate", "best") is not None,
            ("evaluate", "best"),
            "objective.scored_by selects the best checkpoint of preferences, and evaluate.best "
            "only where that is answers",
        ),
        (
            seq2seq and value_at(raw, "data", "packing") is True,
            ("data", "packing"),
            "an encoder-decoder's answers to one prompt are already one row, so preferences "
            "can't be packed",
        ),
        (
            estimates and value_at(raw, "data", "streaming") is True,
            ("data", "streaming"),
            "loss_type kto compares answers with those of other rows, which a stream does not "
            "have at hand; prepare them (streaming: false), or use apo_zero_unpaired",
        ),
    )


def _sampling_contradictions(raw: Any, objective: dict[str, Any]) -> list[Fault]:
    """Returns faults of an objective that samples completions and rewards them."""
    functions = objective.get("reward_funcs", ["exact_match"])
    weights = objective.get("reward_weights")
    number = len(functions) if isinstance(functions, list) else 0
    return _reward_faults(functions if isinstance(functions, list) else []) + broken(
        (
            isinstance(weights, list) and len(weights) != number,
            ("objective", "reward_weights"),
            f"reward_funcs and reward_weights differ in length ({number} and "
            f"{len(weights) if isinstance(weights, list) else 0})",
        ),
        (
            value_at(raw, "data", "packing") is True,
            ("data", "packing"),
            "grpo samples completions of each prompt, and packed rows have several; use "
            "packing: false, and group: image for prompts about one image",
        ),
        (
            value_at(raw, "data", "streaming") is True,
            ("data", "streaming"),
            "grpo samples completions of prepared rows; prepare them (streaming: false)",
        ),
        (
            value_at(raw, "data", "overlong") in ("split", "trim"),
            ("data", "overlong"),
            "grpo samples the last answer of a whole row; use fail or drop",
        ),
        (
            isinstance(value_at(raw, "data", "augment"), dict),
            ("data", "augment"),
            "grpo samples completions of unchanged images; remove data.augment",
        ),
        (
            _shards(raw),
            ("engine",),
            "the engine shards the weights, and grpo samples completions with whole ones; use "
            "ddp, or deepspeed with stage 2",
        ),
    )


def _corruption_contradictions(raw: Any) -> list[Fault]:
    """Returns faults of rows whose answers can't be masked."""
    return broken(
        (
            value_at(raw, "model", "llm", "kind") == "causal",
            ("objective", "kind"),
            "span_corruption needs an encoder-decoder (T5): a decoder reads no text after a gap",
        ),
        *(
            (
                value_at(raw, "data", key) == setting,
                ("data", key),
                f"span_corruption masks spans of rows one by one; {instead}",
            )
            for key, setting, instead in (
                ("group", "image", "group: none"),
                ("packing", True, "packing: false"),
                ("streaming", True, "prepare them (streaming: false)"),
            )
        ),
        (
            value_at(raw, "evaluate", "best") is not None,
            ("evaluate", "best"),
            "span_corruption is scored by its loss on the validation part, which selects the best "
            "checkpoint",
        ),
    )


def _matching_contradictions(raw: Any) -> list[Fault]:
    """Returns faults of rows whose images can't be exchanged."""
    return broken(
        (
            value_at(raw, "data", "group") == "image",
            ("data", "group"),
            "matching shows a row with another row's image, so each row needs its own: group: none",
        ),
        (
            value_at(raw, "data", "packing") is True
            and value_at(raw, "model", "llm", "kind") != "seq2seq",
            ("data", "packing"),
            "matching shows a row with another row's image, so each row stands by itself: "
            "packing: false",
        ),
        *(
            (
                value_at(raw, "model", "tower", key),
                ("model", "tower", key),
                "matching exchanges the images of rows, which have as many each, so no tiles",
            )
            for key in ("tiles", "split")
        ),
        (
            value_at(raw, "train", "batch_size") == 1,
            ("train", "batch_size"),
            "matching takes negatives from the other rows of a micro-batch, and one row has "
            "none; take 2 or more (gradient_accumulation adds none)",
        ),
    )


def _reward_faults(functions: Sequence[Any]) -> list[Fault]:
    """Returns faults of the names of reward functions; functions are imported later."""
    rules = []
    for index, described in enumerate(functions):
        name = value_at(described, "function") if isinstance(described, dict) else described
        if not isinstance(name, str):
            continue
        place = ("objective", "reward_funcs", index)
        known = [*REWARDS, "format"]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else f": {', '.join(known)}"
        given = isinstance(described, dict)
        rules += [
            (
                name not in known and not FUNCTION.fullmatch(name),
                place,
                f"{quoted(name)} is no reward, and no my_module:function{hint}",
            ),
            (
                name == "format" and not given,
                place,
                "format needs a pattern: {function: format, arguments: {pattern: ...}}",
            ),
            (name in REWARDS and given, place, f"{name} takes no arguments: name it alone"),
        ]
    return broken(*rules)


def _shards(raw: Any) -> bool:
    """Whether the engine shards the weights."""
    engine = value_at(raw, "engine", "kind")
    return engine == "fsdp" or (engine == "deepspeed" and value_at(raw, "engine", "stage") == 3)


def _reference_contradictions(raw: Any, objective: dict[str, Any]) -> list[Fault]:
    """Returns faults of the reference model."""
    if not _compares(objective):
        return []
    reference = objective.get("reference", "adapter_off")
    others = _not_switched_off(written_rules(raw))
    return broken(
        (
            reference == "adapter_off" and others,
            ("objective", "reference"),
            f"adapter_off gives the model before training only where all that trains is LoRA "
            f"(not DoRA), and this recipe also has {', '.join(others)}; use reference: copy or "
            "precomputed",
        ),
        (
            reference != "adapter_off" and _shards(raw),
            ("objective", "reference"),
            f"the engine shards the weights, and reference: {reference} needs them whole; use "
            "adapter_off, or another engine",
        ),
        (
            reference == "precomputed" and value_at(raw, "data", "streaming") is True,
            ("objective", "reference"),
            "precomputed needs all rows at hand; prepare them (streaming: false)",
        ),
        (
            reference == "precomputed" and isinstance(value_at(raw, "data", "augment"), dict),
            ("objective", "reference"),
            "precomputed needs unchanged images, and data.augment changes them in each epoch",
        ),
    )


def _compares(objective: Any) -> bool:
    """Whether an objective has a reference model."""
    kind = value_at(objective, "kind")
    return kind in ("dpo", "kto") or (kind == "grpo" and bool(value_at(objective, "beta")))


def _not_switched_off(rules: Sequence[dict[str, Any]]) -> list[str]:
    """The tunings of rules besides LoRA adapters whose scale can be 0, in words."""
    return [
        f"how: {rule.get('how')} for {rule.get('match')}"
        if rule.get("how") != "lora"
        else f"variant: dora for {rule.get('match')}"
        for rule in rules
        if rule.get("how") not in ("lora", "frozen") or rule.get("variant") == "dora"
    ]


def later_adapter_fault(earlier: Sequence[Any], raw: Any) -> list[Fault]:
    """Returns the fault of a stage whose adapters begin where the stage's before ended.

    Switched off, these would give the model before that stage.
    """
    objective = value_at(raw, "objective")
    continued = any(adapter in _adapters(raw) for adapter in _adapters((earlier or [None])[-1]))
    off = _compares(objective) and value_at(objective, "reference") in (None, "adapter_off")
    return broken((continued and off, ("objective", "reference"), CONTINUED))


def _adapters(stage: Any) -> list[TuneRule]:
    """The LoRA adapters that a stage's rules describe; others are merged before the next stage.

    Rules with faults of their own are left out. Settings that no rule gives have their defaults.
    """
    adapters: list[TuneRule] = []
    for raw in written_rules(stage):
        with suppress(ValidationError):
            rule = TuneRule.model_validate(raw)
            if rule.how == "lora":
                adapters.append(_with_defaults(rule))
    return adapters


def _with_defaults(rule: TuneRule) -> TuneRule:
    """A LoRA rule with the defaults that its adapter gets, and without its rates."""
    r = rule.r or LORA_RANK
    return rule.model_copy(
        update={
            "r": r,
            "lora_alpha": rule.lora_alpha or 2 * r,
            "lora_dropout": rule.lora_dropout or 0.0,
            "target_modules": rule.target_modules or "all-linear",
            "variant": rule.variant or "lora",
            "init": rule.init or "default",
            "learning_rate": None,
            "lora_plus_ratio": None,
        }
    )
