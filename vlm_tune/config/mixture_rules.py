"""Checks for lists of objectives, and for sources that name one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlm_tune.config.faults import Fault, broken
from vlm_tune.config.yaml_source import value_at
from vlm_tune.quoting import name_list

MIXED = ("language_modeling", "contrastive", "matching")
"""The objectives that a list may have."""

ALONE = {
    "span_corruption": "masks all rows of a stage",
    "grpo": "trains on answers that it samples",
} | dict.fromkeys(
    ("dpo", "kto", "simpo", "orpo"), "adds losses by its own settings (loss_type, cpo_alpha)"
)
"""Why an objective is in no list, by its kind."""


def mixture_contradictions(raw: Any, objectives: Sequence[Any]) -> list[Fault]:
    """Returns faults of a list of objectives; `raw` holds unchecked values."""
    kinds = [value_at(objective, "kind") for objective in objectives]
    if any(kind not in (*MIXED, *ALONE) for kind in kinds):
        return []
    faults = broken(
        *(
            (
                kind in ALONE,
                ("objective", place, "kind"),
                f"{kind} {ALONE.get(kind)}: give it a stage of its own, without a list; a list "
                f"may have {name_list(MIXED)}",
            )
            for place, kind in enumerate(kinds)
        ),
        *(
            (
                kind in kinds[:place],
                ("objective", place, "kind"),
                f"{kind} is in the list twice; its losses have one weight",
            )
            for place, kind in enumerate(kinds)
        ),
        (
            "contrastive" in kinds and "matching" in kinds,
            ("objective",),
            "contrastive needs data.group: image, and matching group: none; train them in stages "
            "one after the other",
        ),
    )
    return faults or _source_contradictions(raw, kinds)


def _source_contradictions(raw: Any, kinds: Sequence[str]) -> list[Fault]:
    """Returns faults of the sources beside the kinds of a list."""
    apart = "matching" in kinds and len(kinds) > 1
    sources = value_at(raw, "data", "train")
    named = [value_at(each, "objective") for each in sources] if isinstance(sources, list) else []
    return broken(
        *(
            (
                apart and name not in kinds,
                ("data", "train", place),
                "matching reads rows of its own form, so each source names the objective that it "
                f"trains: objective: {' or '.join(kinds)}",
            )
            for place, name in enumerate(named)
        ),
        *(
            (
                apart and kind not in named,
                ("objective", place),
                f"no source trains it: set objective: {kind} of one in data.train",
            )
            for place, kind in enumerate(kinds)
        ),
        *(
            (
                not apart and name is not None,
                ("data", "train", place, "objective"),
                "all rows train all objectives of the list; leave it out",
            )
            for place, name in enumerate(named)
        ),
    )


def lone_objective_contradictions(raw: Any) -> list[Fault]:
    """Returns keys of lists of objectives in a recipe that has one."""
    objective = value_at(raw, "objective")
    sources = value_at(raw, "data", "train")
    return broken(
        (
            value_at(objective, "weight") is not None,
            ("objective", "weight"),
            "weight is for an objective in a list: objective: [{kind: ..., weight: ...}, ...]",
        ),
        *(
            (
                value_at(source, "objective") is not None,
                ("data", "train", place, "objective"),
                "a source names an objective of a list, and this recipe has one objective",
            )
            for place, source in enumerate(sources if isinstance(sources, list) else [])
        ),
    )
