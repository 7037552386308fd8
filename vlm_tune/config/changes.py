"""Differences between two recipes, and those that a run which has begun can't take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vlm_tune.config.recipe import Recipe
from vlm_tune.quoting import cut, escaped

ABSENT = object()
"""Stands for the value of a key or list entry that one of the two recipes lacks."""

RATES = ("learning_rate", "layer_decay", "lora_plus_ratio")
"""Keys of a tuning rule that set how fast something trains, not what."""

PLACES = ("name", "pretrained")
"""Keys of the model section that name the places of weights."""

IN_THE_MODEL = ("template", "system", "enable_thinking", "max_length")
"""Keys of the data section that a checkpoint saves as a part of its model."""


@dataclass(frozen=True)
class Change:
    """A value that differs, by its dotted name; list entries are named by their index."""

    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.name}: {_shown(self.old)} -> {_shown(self.new)}"


def recipe_changes(old: Recipe, new: Recipe) -> list[Change]:
    """Returns every value that `new` changes in `old`.

    The engine is left out: another engine computes the same.
    """
    before, after = (recipe.model_dump(mode="json", exclude={"engine"}) for recipe in (old, new))
    return list(_changes(before, after, ""))


def fixed_changes(old: Recipe, new: Recipe, stage: int) -> list[Change]:
    """Returns the changes that a run can't take once it is in stage `stage` (from 0).

    They would change what its checkpoint holds.
    """
    before, after = (recipe.model_dump(mode="json") for recipe in (old, new))
    # The place of a base may change: loading it checks that it is the same base.
    fixed = [
        change
        for change in _changes(before["model"], after["model"], "model")
        if change.name.rpartition(".")[2] not in PLACES
    ]
    for key in IN_THE_MODEL:
        fixed += _changes(before["data"][key], after["data"][key], f"data.{key}")
    first = old.resolved_stages()
    second = new.resolved_stages()
    for number, (name, recipe) in enumerate(first[: stage + 1]):
        prefix = f"stages.{number}." if old.stages or new.stages else ""
        if number >= len(second):
            fixed.append(Change(f"stages.{number}", name, ABSENT))
            continue
        other, changed = second[number]
        if name != other:
            fixed.append(Change(f"stages.{number}.name", name, other))
        fixed += [
            Change(prefix + change.name, change.old, change.new)
            for change in _stage_changes(recipe, changed)
        ]
    return fixed


def _stage_changes(old: Recipe, new: Recipe) -> Iterator[Change]:
    """Yields the changes that a stage which has begun can't take.

    They concern what trains, its precision, its objective, and whether rows are streamed.
    """
    before = old.model_dump(mode="json")
    after = new.model_dump(mode="json")
    for change in _changes(before["tune"], after["tune"], "tune"):
        if change.name.rpartition(".")[2] not in RATES:
            yield change
    yield from _changes(
        before["train"]["precision"], after["train"]["precision"], "train.precision"
    )
    was, now = (_fixed_of_objective(recipe["objective"]) for recipe in (before, after))
    yield from _changes(was, now, "objective")
    yield from _changes(before["data"]["streaming"], after["data"]["streaming"], "data.streaming")


def _fixed_of_objective(objective: Any) -> Any:
    """The settings of a recipe's objective, or of those of a list, that a stage keeps."""
    if isinstance(objective, list):
        return [_fixed_of_objective(each) for each in objective]
    return {key: objective.get(key) for key in ("kind", "loss", "reference", "scored_by")}


def _changes(old: Any, new: Any, name: str) -> Iterator[Change]:
    prefix = f"{name}." if name else ""
    if isinstance(old, dict) and isinstance(new, dict):
        if old.get("kind") != new.get("kind"):
            # The other keys of another kind mean something else.
            yield Change(f"{prefix}kind", old.get("kind", ABSENT), new.get("kind", ABSENT))
            return
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _changes(old.get(key, ABSENT), new.get(key, ABSENT), f"{prefix}{key}")
    elif isinstance(old, list) and isinstance(new, list):
        for place in range(max(len(old), len(new))):
            one, other = (values[place] if place < len(values) else ABSENT for values in (old, new))
            yield from _changes(one, other, f"{prefix}{place}")
    elif old != new:
        yield Change(name, old, new)


def _shown(value: Any) -> str:
    if value is ABSENT:
        return "nothing"
    if isinstance(value, dict):
        value = {key: each for key, each in value.items() if each is not None}
    return cut(escaped(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
