"""A run's files as the reports read them: they may be cut or edited, or of a run in progress."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vlm_tune.config.yaml_source import read_yaml_text
from vlm_tune.errors import Problem, RecipeError
from vlm_tune.evaluation.registry import lower_is_better
from vlm_tune.paths import is_file, is_folder, shown_path
from vlm_tune.rendering.charts import Curve, Panel
from vlm_tune.rendering.page import percent
from vlm_tune.rendering.report_scores import number_of
from vlm_tune.rendering.scores_text import is_share

Points = list[tuple[int, float]]
"""Figures by step."""


def check_run_folder(run: Path) -> None:
    """Raises `RecipeError` for a folder without recipe.yaml, and where there is no folder."""
    if not is_folder(run):
        raise RecipeError([Problem(shown_path(run), "no such folder")])
    if not is_file(run / "recipe.yaml"):
        raise RecipeError(
            [Problem(shown_path(run), "not the folder of a run: it has no recipe.yaml")]
        )


def recipe_of(run: Path) -> tuple[str, dict[str, Any]]:
    """The text of a run's recipe and its values, of which there are none if it can't be read."""
    text = (run / "recipe.yaml").read_text(encoding="utf-8", errors="replace")
    try:
        values = read_yaml_text(text, "recipe.yaml").value
    except RecipeError:
        values = {}
    return text, values if isinstance(values, dict) else {}


def result_of(run: Path) -> dict[str, Any]:
    """The object in a run's result.json; empty if there is none that can be read."""
    result = read_json(run / "result.json")
    return result if isinstance(result, dict) else {}


def read_json(path: Path) -> Any:
    """The value of a JSON file; None if it is missing or can't be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return None


def read_events(path: Path) -> list[dict[str, Any]]:
    """The log's events; lines that can't be read (the last, if the run was killed) are skipped."""
    events = []
    for line in (
        path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ()
    ):
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return rows_of(events)


def rows_of(value: Any) -> list[dict[str, Any]]:
    """The objects of a list; none of another value."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


@dataclass
class StageLog:
    """The log of one stage: its stage event, and its train and evaluate events by step."""

    number: int
    name: str = ""
    start: dict[str, Any] = field(default_factory=dict)
    train: dict[int, dict[str, Any]] = field(default_factory=dict)
    evaluate: dict[int, dict[str, Any]] = field(default_factory=dict)


def stage_logs(events: Sequence[dict[str, Any]]) -> list[StageLog]:
    """The stages in order; for a step that a resumed run repeated, the later event counts."""
    stages: dict[int, StageLog] = {}
    for event in events:
        number = event.get("stage")
        step = number_of(event.get("step"))
        kind = event.get("event")
        if not isinstance(number, int) or kind not in ("stage", "train", "evaluate"):
            continue
        stage = stages.setdefault(number, StageLog(number))
        stage.name = str(event.get("name") or stage.name)
        if kind == "stage":
            stage.start = event
        elif step is not None:
            (stage.train if kind == "train" else stage.evaluate)[int(step)] = event
    return [stages[number] for number in sorted(stages)]


def points_of(events: dict[int, dict[str, Any]], key: str) -> Points:
    """The numbers by step of a key, or of a mean that the objective logs under that name."""
    return [
        (step, value)
        for step in sorted(events)
        if (value := number_of(events[step].get(key, _metric(events[step], key)))) is not None
    ]


def _metric(event: dict[str, Any], name: str) -> Any:
    """A metric of an event, with or without its interval; an edited log may hold anything."""
    metrics = event.get("metrics")
    entry = metrics.get(name) if isinstance(metrics, dict) else None
    return entry.get("value") if isinstance(entry, dict) else entry


def validation_scores(stage: StageLog) -> list[tuple[str, Points]]:
    """Validation scores by step: of the metric that chooses the best checkpoint, and exact match.

    Those of a metric without a score that can be read are left out.
    """
    chosen = [str(stage.evaluate[step].get("best_by")) for step in sorted(stage.evaluate)][-1:]
    scores = [
        (
            name,
            [
                (step, value)
                for step in sorted(stage.evaluate)
                if (value := _score(stage.evaluate[step], name)) is not None
            ],
        )
        for name in dict.fromkeys([*chosen, "exact_match"])
    ]
    return [(name, points) for name, points in scores if points]


def _score(event: dict[str, Any], name: str) -> float | None:
    """The score by a metric of an evaluation during training; None where it can't be read."""
    if name == "exact_match":
        return number_of(event.get("accuracy"))
    return number_of(_metric(event, name))


def steps_of(stage: StageLog) -> tuple[int, int]:
    """The last step that a stage's log has, and the steps that were planned."""
    last = max([0, *stage.train, *stage.evaluate])
    planned = [stage.start.get("steps"), *(event.get("of") for event in stage.train.values())]
    return last, round(max([last, *filter(None, map(number_of, planned))]))


# --- words ----------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """A time in words."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def start_facts(seed: Any, events: Sequence[dict[str, Any]]) -> str:
    """The run's seed, and when it started."""
    facts = [] if seed is None else [f"seed {seed}"]
    times = [
        moment
        for event in events
        if (moment := number_of(event.get("time"))) is not None and 0 <= moment < 1e11
    ]
    if times:
        facts.append(f"started {datetime.fromtimestamp(times[0], UTC):%Y-%m-%d %H:%M} UTC")
    return ", ".join(facts)


def best_score(name: str, points: Points) -> str:
    """The best of the validation scores by a metric, and its step, in words."""
    sign = -1 if lower_is_better(name) else 1
    # Of checkpoints with equal scores the run keeps the later.
    step, best = max(points, key=lambda point: (sign * point[1], point[0]))
    return f"best {percent(best) if is_share(name) else f'{best:.4g}'} at {step:,}"


def score_panel(name: str, curves: Sequence[Curve]) -> Panel:
    """The panel of scores by a metric: shares in percent."""
    if not is_share(name):
        return Panel("score", curves)
    return Panel(
        "share",
        [
            Curve([(step, 100 * value) for step, value in curve.points], curve.stroke)
            for curve in curves
        ],
    )
