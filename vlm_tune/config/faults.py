"""Tables of rules between keys of a recipe, and the faults of those that it breaks."""

from __future__ import annotations

from vlm_tune.config.yaml_source import Path

Fault = tuple[Path, str]
"""The place of a fault in a recipe, and its message."""


def broken(*rules: tuple[object, Path, str]) -> list[Fault]:
    """The faults of rules, each (whether the recipe breaks it, place, message)."""
    return [(place, message) for breaks, place, message in rules if breaks]
