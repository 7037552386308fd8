"""The report of a run: one HTML file without scripts or network.

Its charts are inline SVG, its images inline PNG.
"""

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
from vlm_tune.evaluation.texts import normalise
from vlm_tune.paths import shown_path
from vlm_tune.rendering.charts import Chart, Panel, chart
from vlm_tune.rendering.page import is_long, percent, thumbnail, write_html
from vlm_tune.rendering.report_scores import (
    baseline_rows,
    class_tables,
    group_table,
    interval_text,
    media_named,
    metric_rows,
    number_of,
    other_rows,
    score_notes,
    worst_answers,
)
from vlm_tune.rendering.scores_text import is_share, metric_title

COLUMNS = ("before", "after")
"""The columns of samples.json that hold the model's answers: before and after training."""


def write_report(run: Path) -> Path:
    """Writes `report.html` into a run's folder, from the files there, and returns its path.

    Parts whose file is missing are left out. Raises `RecipeError` for a folder without recipe.yaml.
    """
    if not (run / "recipe.yaml").is_file():
        raise RecipeError(
            [Problem(shown_path(run), "not the folder of a run: it has no recipe.yaml")]
        )
    recipe = (run / "recipe.yaml").read_text(encoding="utf-8", errors="replace")
    try:
        values = read_yaml_text(recipe, "recipe.yaml").value
    except RecipeError:
        values = {}
    events = _events(run / "log.jsonl")
    result = _read(run / "result.json")
    result = result if isinstance(result, dict) else {}
    samples = _rows(_read(run / "samples.json"))
    worst, worst_note = worst_answers(run)
    page = {
        "name": str(values.get("name") or run.resolve().name),
        "note": _facts(values.get("seed"), events),
        "figures": _figures(result),
        "metrics": metric_rows(result),
        "groups": {
            kind: group_table(result, result.get(f"by_{kind}")) for kind in ("category", "source")
        },
        "baselines": baseline_rows(result),
        "others": other_rows(result),
        "classes": class_tables(result),
        "worst": worst,
        "worst_note": worst_note,
        "stages": [_stage(stage) for stage in _stages(events)],
        "tuning": _tuning(_rows(_read(run / "tuning.json"))),
        "samples": [_sample(run, row) for row in samples],
        "right_counts": _right_counts(samples),
        "notes": [
            *(
                event["text"]
                for event in events
                if event.get("event") == "note" and event.get("text")
            ),
            *score_notes(result),
        ],
        "recipe": recipe,
    }
    path = run / "report.html"
    write_html(path, "report.html", page)
    return path


# --- reading --------------------------------------------------------------------------------------


def _read(path: Path) -> Any:
    """The value of a JSON file; None if it is missing or can't be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return None


def _events(path: Path) -> list[dict[str, Any]]:
    """The log's events; lines that can't be read (the last, if the run was killed) are skipped."""
    events = []
    for line in (
        path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ()
    ):
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return _rows(events)


def _rows(value: Any) -> list[dict[str, Any]]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


@dataclass
class _Stage:
    """The log of one stage: its stage event, and its train and evaluate events by step."""

    number: int
    name: str = ""
    start: dict[str, Any] = field(default_factory=dict)
    train: dict[int, dict[str, Any]] = field(default_factory=dict)
    evaluate: dict[int, dict[str, Any]] = field(default_factory=dict)


def _stages(events: Sequence[dict[str, Any]]) -> list[_Stage]:
    """The stages in order; for a step that a resumed run repeated, the later event counts."""
    stages: dict[int, _Stage] = {}
    for event in events:
        number = event.get("stage")
        step = number_of(event.get("step"))
        kind = event.get("event")
        if not isinstance(number, int) or kind not in ("stage", "train", "evaluate"):
            continue
        stage = stages.setdefault(number, _Stage(number))
        stage.name = str(event.get("name") or stage.name)
        if kind == "stage":
            stage.start = event
        elif step is not None:
            (stage.train if kind == "train" else stage.evaluate)[int(step)] = event
    return [stages[number] for number in sorted(stages)]


def _points(events: dict[int, dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """The values by step of a field, or of a mean that the objective logs."""
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


# --- parts ----------------------------------------------------------------------------------------


def _duration(seconds: float) -> str:
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def _count(value: Any, unit: str = "") -> str:
    """A whole number with its unit in the plural or singular; "" for a value that is no number."""
    number = number_of(value)
    return (
        ""
        if number is None
        else f"{number:,.0f} {unit if number == 1 or not unit else unit + 's'}".rstrip()
    )


def _facts(seed: Any, events: Sequence[dict[str, Any]]) -> str:
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


def _figures(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The headline figures as (label, figure, note)."""
    figures = []
    if (accuracy := number_of(result.get("accuracy"))) is not None:
        questions = _count(result.get("n"), "question")
        metrics = result.get("metrics")
        exact = metrics.get("exact_match") if isinstance(metrics, dict) else None
        ends = interval_text("exact_match", exact)
        notes = [f"of {questions}" if questions else "", f"95% interval {ends}" if ends else ""]
        figures.append(("Test accuracy", percent(accuracy, 2), ", ".join(filter(None, notes))))
    if (loss := number_of(result.get("loss"))) is not None:
        figures.append(("Test loss", f"{loss:.4g}", "per supervised token"))
    if (seconds := number_of(result.get("seconds"))) is not None:
        figures.append(("Training time", _duration(seconds), "all stages"))
    if (memory := number_of(result.get("peak_memory_mb"))) is not None:
        figures.append(("Peak memory", f"{memory:,.0f} MB", "of the process"))
    if (memory := number_of(result.get("peak_gpu_memory_mb"))) is not None:
        reserved = number_of(result.get("peak_gpu_reserved_mb"))
        note = "" if reserved is None else f"{reserved:,.0f} MB reserved"
        figures.append(("Peak GPU memory", f"{memory:,.0f} MB", note))
    return figures


def _reward_charts(stage: _Stage, steps: int) -> list[Any]:
    """The chart of the margin between the rewards of chosen and rejected answers."""
    trained, held_out = (
        _points(events, "rewards/margins") for events in (stage.train, stage.evaluate)
    )
    keys = [("line", f"training, last {trained[-1][1]:.3g}")] if trained else []
    if held_out:
        keys.append(("dots", f"validation, last {held_out[-1][1]:.3g}"))
    if not keys:
        return []
    return [chart("Margin of rewards", keys, [Panel("margin", trained, held_out)], steps)]


def _stage(stage: _Stage) -> dict[str, Any]:
    """A stage's title, its facts in words, and its charts."""
    loss, rate, speed = (
        _points(stage.train, key) for key in ("loss", "learning_rate", "questions_per_s")
    )
    held_out = _points(stage.evaluate, "loss")
    last = max([0, *stage.train, *stage.evaluate])
    planned = [stage.start.get("steps"), *(event.get("of") for event in stage.train.values())]
    steps = round(max([last, *filter(None, map(number_of, planned))]))
    facts = [
        _count(steps, "step"),
        _count(stage.start.get("questions"), "question"),
        _count(stage.start.get("images"), "image"),
    ]
    if last < steps:
        facts.append(f"the log ends at step {last:,}")
    charts = []
    if loss or held_out:
        keys = [("line", f"training, last {loss[-1][1]:.3g}")] if loss else []
        if held_out:
            step, lowest = min(held_out, key=lambda point: point[1])
            keys.append(("dots", f"validation, lowest {lowest:.3g} at {step:,}"))
        charts.append(chart("Loss", keys, [Panel("loss", loss, held_out)], steps))
    charts += [_score_chart(name, points, steps) for name, points in _scores(stage)]
    charts += _reward_charts(stage, steps)
    panels = [
        Panel(kind, points, [])
        for kind, points in (("learning rate", rate), ("questions/s", speed))
        if points
    ]
    if panels:
        keys = [("", f"highest {max(value for _, value in rate):.3g}")] if rate else []
        if speed:
            keys.append(
                ("", f"mean {sum(value for _, value in speed) / len(speed):,.4g} questions/s")
            )
        charts.append(chart("Learning rate and speed", keys, panels, steps))
    title = f"Stage {stage.number + 1}" + (f": {stage.name}" if stage.name else "")
    return {"title": title, "facts": ", ".join(filter(None, facts)), "charts": charts}


def _scores(stage: _Stage) -> list[tuple[str, list[tuple[int, float]]]]:
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


def _score_chart(name: str, points: Sequence[tuple[int, float]], steps: int) -> Chart:
    """The chart of validation scores by a metric, with the best."""
    sign = -1 if lower_is_better(name) else 1
    # Of checkpoints with equal scores the run keeps the later.
    step, best = max(points, key=lambda point: (sign * point[1], point[0]))
    share = is_share(name)
    panel = Panel(
        "share" if share else "score",
        [],
        [(step, 100 * value if share else value) for step, value in points],
    )
    title = metric_title(name)
    return chart(
        title[0].upper() + title[1:],
        [("dots", f"validation, best {percent(best) if share else f'{best:.4g}'} at {step:,}")],
        [panel],
        steps,
    )


def _tuning(stages: Sequence[dict[str, Any]]) -> list[tuple[Any, list[dict[str, Any]]]]:
    """The lines of each stage's tuning table, with their sum where there are several."""
    tables = []
    for stage in stages:
        rows = _rows(stage.get("rows"))
        if len(rows) > 1:
            together = {
                key: sum(number_of(row.get(key)) or 0 for row in rows)
                for key in ("trained", "total")
            }
            rows.append({"match": "together", **together})
        if rows:
            tables.append((stage.get("stage", ""), [_tuning_line(row) for row in rows]))
    return tables


def _tuning_line(row: dict[str, Any]) -> dict[str, Any]:
    rate, trained, total = (
        number_of(row.get(key)) for key in ("learning_rate", "trained", "total")
    )
    share = percent(trained / total, 2) if trained is not None and total else ""
    figures = ("" if rate is None else f"{rate:g}", _count(trained), _count(total), share)
    texts = {key: row.get(key) or "" for key in ("match", "how", "detail")}
    return {**texts, "figures": figures}


# --- samples --------------------------------------------------------------------------------------


def _sample(run: Path, row: dict[str, Any]) -> dict[str, Any]:
    """A sample's texts, its answers as (column, answer, verdict), and its thumbnail."""
    question, expected = (row.get(key) for key in ("question", "expected"))
    answers = [(column, row.get(column), _verdict(row.get(column), expected)) for column in COLUMNS]
    texts = (question, expected, *(answer for _, answer, _ in answers))
    return {
        "question": question,
        "expected": expected,
        "answers": answers,
        "thumbnail": thumbnail(media_named(run, row.get("image"))),
        "long": is_long(map(str, texts)),
    }


def _verdict(answer: Any, expected: Any) -> str:
    """Returns "right", "wrong", or "" where there is no answer or none is expected."""
    if answer is None or expected is None:
        return ""
    # The metric's own comparison: a different one could contradict the accuracy above.
    return "right" if normalise(str(answer)) == normalise(str(expected)) else "wrong"


def _right_counts(rows: Sequence[dict[str, Any]]) -> str:
    """The numbers of right answers before and after training, in words."""
    counts = []
    for column in COLUMNS:
        verdicts = [_verdict(row.get(column), row.get("expected")) for row in rows]
        marked = len(verdicts) - verdicts.count("")
        if marked:
            counts.append(f"{column} training {verdicts.count('right')} of {marked} right")
    return ", ".join(counts)
