"""Optimizer groups of tuned parameters, one per rule and learning rate, and the tuning table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vlm_tune.config.objectives import AnyObjective, Contrastive, part_of
from vlm_tune.config.tune import TuneRule
from vlm_tune.model.language.virtual_tokens import KINDS, TOKENS
from vlm_tune.model.layer_index import columns, depths
from vlm_tune.model.lora import is_adapter, parts, rule_name
from vlm_tune.model.similarity import SIMILARITY, Similarity
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.model.weights import count_of

Member = tuple[str, nn.Parameter, float]
"""A trained parameter's name, itself, and the factor of its learning rate."""


@dataclass(frozen=True)
class TuneRow:
    """One line of the tuning table: a rule, and how many parameters it covers and trains."""

    match: str
    how: str
    learning_rate: float | None
    trained: int
    total: int
    detail: str


@dataclass
class Tuned:
    """Optimizer groups with their parameters' names, and the table that is printed and saved."""

    groups: list[dict[str, Any]]
    names: list[list[str]]
    table: list[TuneRow]


def collect_groups(
    model: VisionLanguageNetwork,
    rules: Sequence[TuneRule],
    owner: dict[str, int],
    learning_rate: float,
) -> Tuned:
    """Builds the optimizer groups, one per rule and factor of its learning rate, and the table."""
    members, totals = _members(model, rules, owner)
    groups = []
    names = []
    table = []
    for rule, rule_members, total in zip(rules, members, totals, strict=True):
        rate = rule.learning_rate or learning_rate
        factors = sorted({factor for _, _, factor in rule_members}, reverse=True)
        for factor in factors:
            groups.append(
                {
                    "params": [
                        parameter
                        for _, parameter, parameter_factor in rule_members
                        if parameter_factor == factor
                    ],
                    "lr": rate * factor,
                }
            )
            names.append(
                [name for name, _, parameter_factor in rule_members if parameter_factor == factor]
            )
        trained = sum(parameter.numel() for _, parameter, _ in rule_members)
        table.append(
            TuneRow(
                rule.match,
                rule.how,
                rate if rule_members else None,
                trained,
                total,
                _detail(rule, rate, factors),
            )
        )
    return Tuned(groups, names, table)


def tune_similarity(
    model: VisionLanguageNetwork, objective: AnyObjective, tuned: Tuned, learning_rate: float
) -> None:
    """Adds the learned scale of an objective to the model, the optimizer groups and the table.

    One of an earlier stage with the same loss is trained on. Under other objectives it stays as it
    is. It has no weight decay.
    """
    contrastive = part_of(objective, Contrastive)
    if contrastive is None or not contrastive.learns_scale:
        if model.similarity is not None:
            model.similarity.requires_grad_(False)
        return
    bias = contrastive.first_bias
    present = model.similarity
    if present is None or (present.logit_bias is None) != (bias is None):
        device = next(model.connector.parameters()).device
        model.similarity = present = Similarity(contrastive.temperature, bias).to(device)
    present.requires_grad_(True)
    named = dict(present.named_parameters())
    tuned.groups.append({"params": list(named.values()), "lr": learning_rate, "weight_decay": 0.0})
    tuned.names.append([f"{SIMILARITY}.{name}" for name in named])
    tuned.table.append(
        TuneRow(SIMILARITY, "full", learning_rate, len(named), len(named), "learned scale")
    )


def _members(
    model: VisionLanguageNetwork, rules: Sequence[TuneRule], owner: dict[str, int]
) -> tuple[list[list[Member]], list[int]]:
    """The trained parameters of each rule, and the number of weights that each rule covers."""
    members: list[list[Member]] = [[] for _ in rules]
    totals = [0] * len(rules)
    for part, module in parts(model).items():
        under = _depths(part, module, rules, owner)
        for name, parameter in module.named_parameters():
            place = owner[_rule_name_of(model, part, name)]
            totals[place] += count_of(parameter)
            if parameter.requires_grad:
                members[place].append(
                    (f"{part}.{name}", parameter, _factor(rules[place], name, under))
                )
    prompt = next((place for place, rule in enumerate(rules) if rule.how in KINDS), None)
    if prompt is not None and model.llm.prompt is not None:
        values = model.llm.prompt.values
        totals[prompt] += values.numel()
        members[prompt].append(("llm.prompt.values", values, 1.0))
    return members, totals


def _rule_name_of(model: VisionLanguageNetwork, part: str, name: str) -> str:
    """The name by which rules know a parameter, or the weight that an adapter's one is beside."""
    if is_adapter(name):
        name = f"{name.partition('.lora_')[0]}.weight"
    return rule_name(model, part, name)


def _depths(
    part: str, module: nn.Module, rules: Sequence[TuneRule], owner: dict[str, int]
) -> dict[str, int]:
    """The depths of the part's parameters, if a rule for it has a layer decay; empty otherwise."""
    decayed = {place for place, rule in enumerate(rules) if rule.layer_decay is not None}
    if not any(where in decayed and name.startswith(f"{part}.") for name, where in owner.items()):
        return {}
    return {
        f"{prefix}{name}": depth
        for prefix, column in columns(module).items()
        for name, depth in depths(column, language=part == "llm").items()
    }


def _factor(rule: TuneRule, name: str, under: dict[str, int]) -> float:
    """The factor of a parameter's learning rate, from LoRA+ or the layer decay."""
    if rule.lora_plus_ratio is not None:
        return rule.lora_plus_ratio if "lora_B" in name else 1.0
    return 1.0 if rule.layer_decay is None else rule.layer_decay ** under[name]


def _detail(rule: TuneRule, rate: float, factors: Sequence[float]) -> str:
    """The table's details of a rule beside its learning rate."""
    phrases = []
    if rule.how == "last_layers":
        phrases.append(f"last {rule.layers}")
    if rule.layer_decay is not None and factors:
        phrases.append(
            f"decay={rule.layer_decay:g}, from {rate * factors[0]:.2g} to {rate * factors[-1]:.2g}"
        )
    if rule.how in KINDS:
        phrases.append(f"{rule.tokens or TOKENS} tokens")
    if rule.how == "lora":
        phrases.append(f"r={rule.r or 16}, alpha={rule.lora_alpha or 2 * (rule.r or 16):g}")
        phrases += [
            name for name in (rule.variant, rule.init) if name not in (None, "lora", "default")
        ]
        if rule.sharing == "soft":
            phrases.append(f"one for each task, tie={rule.tie:g}")
        if rule.sharing == "layered":
            phrases.append(f"one for each task above {rule.shared_layers} layers")
        if rule.lora_plus_ratio is not None:
            phrases.append(f"B at {rate * rule.lora_plus_ratio:.2g}")
    return ", ".join(phrases)
