"""The recipe's `tune`: rules for which parameters train, and how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from vlm_tune.config.base import Config, LearningRate, PositiveFloat, PositiveInt, Width
from vlm_tune.config.yaml_source import value_at

TRAINS_BASE = ("full", "last_layers", "norms", "biases")
"""Kinds of tuning that change the model's own weights, all of them or some."""

LORA_RANK = 16
"""The rank of a LoRA rule without one; its alpha is twice its rank."""


class TuneRule(Config):
    """A rule for training the parameters whose name matches; the first matching rule applies."""

    match: str = Field(
        description="a glob over names: tower.*, connector.*, llm.*, llm.model.layers.0.*"
    )
    how: Literal["frozen", "full", "last_layers", "norms", "biases", "lora", "prompt", "prefix"]
    learning_rate: LearningRate | None = Field(
        default=None, description="learning rate; the train section's by default"
    )
    layers: PositiveInt | None = Field(
        default=None,
        description="number of last blocks to train; other matching parameters are frozen "
        "(last_layers only)",
    )
    layer_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="factor of the learning rate per block, from the top down (full and "
        "last_layers only)",
    )
    r: Width | None = Field(default=None, description="LoRA rank (lora only)")
    lora_alpha: PositiveFloat | None = Field(
        default=None,
        description="LoRA's scale is lora_alpha / r, or / sqrt(r) for rsLoRA (lora only)",
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="LoRA dropout (lora only)"
    )
    target_modules: list[str] | Literal["all-linear"] | None = Field(
        default=None,
        description="module names as in PEFT; all-linear leaves out the output head (lora only)",
    )
    variant: Literal["lora", "rslora", "dora"] | None = Field(
        default=None,
        description="rsLoRA scales by sqrt(r), DoRA learns magnitudes separately (lora only)",
    )
    init: Literal["default", "gaussian", "pissa"] | None = Field(
        default=None,
        description="A random and B zero, or both from the weight's principal singular "
        "vectors (lora only)",
    )
    pissa_niter: Annotated[int, Field(ge=1, le=64)] | None = Field(
        default=None,
        description="iterations of a randomised SVD, seconds where the exact one takes minutes; "
        "exact by default (init: pissa only)",
    )
    lora_plus_ratio: Annotated[float, Field(ge=1, le=1e6)] | None = Field(
        default=None, description="LoRA+: ratio of B's learning rate to A's (lora only)"
    )
    sharing: Literal["hard", "soft", "layered"] | None = Field(
        default=None,
        description="how tasks share the llm's adapter; hard (the default): one for all, soft: one "
        "for each, tied to their mean, layered: one in the first layers, one for each above "
        "(lora only)",
    )
    tie: PositiveFloat | None = Field(
        default=None,
        description="soft: half of tie times the squared distance of each task's adapter from "
        "their mean is added to the loss of a step",
    )
    shared_layers: PositiveInt | None = Field(
        default=None,
        description="layered: number of first blocks of the llm whose adapter all tasks share",
    )
    tokens: Width | None = Field(
        default=None,
        description="virtual tokens before each row; 20 by default (prompt and prefix only)",
    )

    @property
    def trains_base(self) -> bool:
        """Whether the rule changes the model's own weights, all of them or some."""
        return self.how in TRAINS_BASE

    @property
    def by_task(self) -> bool:
        """Whether each task has an adapter of its own, in some layers or all."""
        return self.sharing in ("soft", "layered")


def written_rules(raw: Any) -> list[dict[str, Any]]:
    """Returns a recipe's unchecked tuning rules; one that is not a mapping is empty."""
    written = value_at(raw, "tune")
    return [
        rule if isinstance(rule, dict) else {}
        for rule in (written if isinstance(written, list) else [])
    ]


def adds_virtual_tokens(raw: Any) -> bool:
    """Whether a tuning rule trains a prompt or a prefix."""
    return any(rule.get("how") in ("prompt", "prefix") for rule in written_rules(raw))


def adds_dora(raw: Any) -> bool:
    """Whether a tuning rule gives the LLM adapters of the variant DoRA."""
    return any(
        rule.get("variant") == "dora" and str(rule.get("match")).startswith(("llm", "*"))
        for rule in written_rules(raw)
    )


def task_rule(rules: Sequence[TuneRule]) -> TuneRule | None:
    """The rule by which tasks have adapters of their own; None where they have the same."""
    return next((rule for rule in rules if rule.by_task), None)
