"""Changes of a recipe that reduce its memory, and how they are written as overrides."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from vlm_tune.config.recipe import Recipe
from vlm_tune.config.rules import contradictions
from vlm_tune.config.train import TrainSection

Change = Callable[[TrainSection], dict[str, Any]]
"""Maps a train section to the fields that a change sets, with their new values."""


def changes(
    recipe: Recipe, processes: int, zero: int
) -> Iterator[tuple[str, Change, str | None, int]]:
    """Yields the changes that apply to a recipe.

    Each is a tuple of a description, the change of a train section, the LLM's quantisation (None
    if unchanged) and the ZeRO stage.
    """
    stages = [stage for _, stage in recipe.resolved_stages()]
    divided = all(stage.train.batch_size > 1 or stage.train.batch_tokens for stage in stages)
    unchecked = not all(stage.train.gradient_checkpointing for stage in stages)
    lone = all(
        not rule.match.startswith(("llm", "*"))
        for stage in stages
        for rule in stage.tune
        if rule.how == "full"
    )
    packs = recipe.model.llm.quantize is None and recipe.scratch is None and lone
    none: Change = lambda train: {}  # noqa: E731
    if divided:
        yield "half the batch, twice the accumulation (the same gradient)", _halved, None, zero
    if any(stage.train.batch_size > 2 and not stage.train.batch_tokens for stage in stages):
        yield "one row at a time (the same gradient)", _alone, None, zero
    if unchecked:
        yield "gradient checkpointing (a third more work)", _checkpointed, None, zero
    if packs:
        yield "the LLM's frozen weights in nf4", none, "nf4", zero
    if divided + unchecked + packs > 1:

        def all_of_these(train: TrainSection) -> dict[str, Any]:
            return (_halved(train) if divided else {}) | (_checkpointed(train) if unchecked else {})

        yield "all of these", all_of_these, "nf4" if packs else None, zero
    ranks = max(processes, 2)
    for stage in (2, 3):
        if zero < stage and _is_allowed(recipe, stage, None):
            yield f"DeepSpeed ZeRO-{stage} on {ranks} processes", none, None, stage
    if packs and zero < 3 and _is_allowed(recipe, 3, "nf4"):
        yield f"the LLM's weights in nf4 and ZeRO-3 on {ranks} processes", none, "nf4", 3


def _is_allowed(recipe: Recipe, stage: int, quantize: str | None) -> bool:
    """Whether no rule of recipes forbids a ZeRO stage, with the LLM quantised so if given."""
    for _, part in recipe.resolved_stages():
        raw = part.model_dump(mode="json", exclude_unset=True)
        changed = raw | {"engine": {"kind": "deepspeed", "stage": stage}}
        if quantize is not None:
            llm = (raw["model"].get("llm") or {}) | {"quantize": quantize}
            changed["model"] = raw["model"] | {"llm": llm}
        known = contradictions(raw)
        if not all(fault in known for fault in contradictions(changed)):
            return False
    return True


def _halved(train: TrainSection) -> dict[str, Any]:
    if train.batch_tokens:
        smaller = {"batch_tokens": max(train.batch_tokens // 2, 1)}
    else:
        smaller = {"batch_size": max(train.batch_size // 2, 1)}
    return {**smaller, "gradient_accumulation": 2 * train.gradient_accumulation}


def _alone(train: TrainSection) -> dict[str, Any]:
    return {
        "batch_size": 1,
        "gradient_accumulation": train.batch_size * train.gradient_accumulation,
    }


def _checkpointed(train: TrainSection) -> dict[str, Any]:
    return {"gradient_checkpointing": True}


def changed(recipe: Recipe, change: Change, quantize: str | None) -> Recipe:
    """The recipe with every stage's train section changed, and its LLM quantised."""
    fields = recipe.model_dump(exclude_unset=True)
    fields["train"] |= change(recipe.train)
    for stage, (_, resolved) in zip(
        fields.get("stages", []), recipe.resolved_stages(), strict=False
    ):
        overrides = stage.get("train", {})
        stage["train"] = overrides | {
            key: value for key, value in change(resolved.train).items() if key in overrides
        }
    if quantize:
        fields["model"].setdefault("llm", {})["quantize"] = quantize
    return Recipe.model_validate(fields)


def written(where: str, values: dict[str, Any]) -> list[str]:
    """Values as overrides of the command line."""
    return [f"{where}.{key}={json.dumps(value)}" for key, value in values.items()]
