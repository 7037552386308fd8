"""Checks for rules by which tasks have adapters of their own, and for what these need elsewhere."""

from __future__ import annotations

import re
from typing import Any

from vlm_tune.config.faults import Fault, broken
from vlm_tune.config.tune import written_rules
from vlm_tune.config.yaml_source import value_at
from vlm_tune.quoting import quoted

TASK = re.compile(r"[A-Za-z0-9_-]+")
"""The name of a task with an adapter of its own: of a folder, and of PEFT's adapter."""
TAKEN = ("default", "initial")
"""Names of adapters that have another meaning."""
FACTORS = {"tie": "soft", "shared_layers": "layered"}
"""Keys of a rule that belong to one kind of sharing, which needs them."""


def sharing_contradictions(raw: Any) -> list[Fault]:
    """Returns faults of adapters of tasks; `raw` holds unchecked values."""
    rules = written_rules(raw)
    faults = [
        (("tune", index, *path), message)
        for index, rule in enumerate(rules)
        for path, message in _rule_contradictions(rule)
    ]
    sharing = next((rule["sharing"] for rule in rules if _by_task(rule)), None)
    if sharing is None:
        return faults
    return [*faults, *_task_contradictions(raw, sharing), *_run_contradictions(raw, sharing)]


def _by_task(rule: dict[str, Any]) -> bool:
    return rule.get("how") == "lora" and rule.get("sharing") in list(FACTORS.values())


def _rule_contradictions(rule: dict[str, Any]) -> list[Fault]:
    """Returns faults of one rule, by its keys."""
    sharing = rule.get("sharing")
    match = rule.get("match")
    return broken(
        *(
            (
                rule.get(key) is not None and rule.get("how") == "lora" and sharing != kind,
                (key,),
                f"{key} belongs to sharing: {kind}",
            )
            for key, kind in FACTORS.items()
        ),
        *(
            (
                sharing == kind and rule.get(key) is None,
                ("sharing",),
                f"sharing: {kind} needs {key}",
            )
            for key, kind in FACTORS.items()
        ),
        (
            _by_task(rule) and isinstance(match, str) and match.split(".")[0] != "llm",
            ("sharing",),
            "tasks can have adapters of their own on the llm alone; they share the tower and the "
            "connector",
        ),
        (
            _by_task(rule) and rule.get("init") == "pissa",
            ("init",),
            f"PiSSA's frozen adapter is one, and with sharing: {sharing} there are several; use "
            "another init",
        ),
    )


def _task_contradictions(raw: Any, sharing: str) -> list[Fault]:
    """Returns faults of the tasks that sources name."""
    faults: list[Fault] = []
    trained: list[str] = []
    for part in ("train", "validation", "test"):
        sources = value_at(raw, "data", part)
        for index, source in enumerate(sources if isinstance(sources, list) else []):
            task = value_at(source, "task_name")
            place = ("data", part, index)
            if task is None:
                faults.append((place, f"sharing: {sharing} needs a task_name for its rows"))
            elif part == "train":
                trained.append(str(task))
                unfit = TASK.fullmatch(str(task)) is None or task in TAKEN
                message = (
                    f"a task with an adapter of its own is named by letters, digits, _ and -, and "
                    f"not {' or '.join(TAKEN)}"
                )
                faults += broken((unfit, (*place, "task_name"), message))
            elif str(task) not in trained:
                message = f"no source of data.train has the task {quoted(str(task))}"
                faults.append(((*place, "task_name"), message))
    named = len(set(trained)) > 1 or any(path[1] == "train" for path, _ in faults)
    single = f"sharing: {sharing} needs two tasks or more, and all sources have the same task_name"
    return faults + broken((not named, ("data", "train"), single))


def _run_contradictions(raw: Any, sharing: str) -> list[Fault]:
    """Returns settings of a run that adapters of tasks can't train or be scored with."""
    engine = value_at(raw, "engine", "kind")
    zero3 = engine == "deepspeed" and value_at(raw, "engine", "stage") == 3
    objective = value_at(raw, "objective", "kind")
    return broken(
        (
            engine == "fsdp" or zero3,
            ("engine",),
            f"sharing: {sharing} runs other adapters in each micro-batch, and this engine gathers "
            "sharded weights as modules run; use ddp, or deepspeed with stage 2",
        ),
        (
            objective not in (None, "language_modeling"),
            ("objective", "kind"),
            f"sharing: {sharing} is for objective.kind: language_modeling",
        ),
        (
            value_at(raw, "data", "own_shards") is True,
            ("data", "own_shards"),
            "a micro-batch is of one task on all processes, and with own_shards each reads rows "
            "of its own; drop one of them",
        ),
        (
            value_at(raw, "evaluate", "also"),
            ("evaluate", "also"),
            f"rows of other tasks have no adapter with sharing: {sharing}",
        ),
    )
