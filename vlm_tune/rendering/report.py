"""The report of a run: one HTML file without scripts or network.

Its charts are inline SVG, its images inline PNG.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_tune.evaluation.texts import normalise
from vlm_tune.rendering.charts import DOTS, LINE, Chart, Curve, Key, Panel, chart
from vlm_tune.rendering.media_text import NOUNS, counts_shown, medium_names
from vlm_tune.rendering.page import is_long, percent, regions_drawn, thumbnail, write_html
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
from vlm_tune.rendering.run_log import (
    Points,
    StageLog,
    best_score,
    check_run_folder,
    duration,
    points_of,
    read_events,
    read_json,
    recipe_of,
    result_of,
    rows_of,
    score_panel,
    stage_logs,
    start_facts,
    steps_of,
    validation_scores,
)
from vlm_tune.rendering.scores_text import MARGINS, REWARD, metric_title

COLUMNS = ("before", "after")
"""The columns of samples.json that hold the model's answers: before and after training."""


def write_report(run: Path, path: Path | None = None) -> Path:
    """Writes the report of a run from the files in its folder, and returns the report's path.

    It is `report.html` in that folder where `path` is not given. Parts whose file is missing are
    left out. Raises `RecipeError` for a folder without recipe.yaml.
    """
    check_run_folder(run)
    recipe, values = recipe_of(run)
    events = read_events(run / "log.jsonl")
    result = result_of(run)
    samples = rows_of(read_json(run / "samples.json"))
    worst, worst_note = worst_answers(run)
    page = {
        "name": str(values.get("name") or run.resolve().name),
        "note": start_facts(values.get("seed"), events),
        "figures": _figures(result),
        **medium_names([result]),
        "metrics": metric_rows(result),
        "groups": {
            kind: group_table(result, result.get(f"by_{kind}")) for kind in ("category", "source")
        },
        "baselines": baseline_rows(result),
        "others": other_rows(result),
        "classes": class_tables(result),
        "worst": worst,
        "worst_note": worst_note,
        "stages": [_stage(stage) for stage in stage_logs(events)],
        "tuning": _tuning(rows_of(read_json(run / "tuning.json"))),
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
    path = path or run / "report.html"
    write_html(path, "report.html", page)
    return path


# --- parts ----------------------------------------------------------------------------------------


def _count(value: Any, unit: str = "") -> str:
    """A whole number with its unit in the plural or singular; "" for a value that is no number."""
    number = number_of(value)
    return (
        ""
        if number is None
        else f"{number:,.0f} {unit if number == 1 or not unit else unit + 's'}".rstrip()
    )


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
        figures.append(("Training time", duration(seconds), "all stages"))
    if (memory := number_of(result.get("peak_memory_mb"))) is not None:
        figures.append(("Peak memory", f"{memory:,.0f} MB", "of the process"))
    if (memory := number_of(result.get("peak_gpu_memory_mb"))) is not None:
        reserved = number_of(result.get("peak_gpu_reserved_mb"))
        note = "" if reserved is None else f"{reserved:,.0f} MB reserved"
        figures.append(("Peak GPU memory", f"{memory:,.0f} MB", note))
    return figures


def _reward_charts(stage: StageLog, steps: int) -> list[Chart]:
    """Charts of the margin between rewards of chosen and rejected answers, or of sampled ones'."""
    charts = []
    for name, title, unit in (
        (MARGINS, "Margin of rewards", "margin"),
        (REWARD, "Mean reward of sampled answers", "reward"),
    ):
        trained, held_out = (points_of(events, name) for events in (stage.train, stage.evaluate))
        keys = [Key(f"training, last {trained[-1][1]:.3g}", "line")] if trained else []
        if held_out:
            keys.append(Key(f"validation, last {held_out[-1][1]:.3g}", "dots"))
        if keys:
            charts.append(chart(title, keys, [Panel(unit, _curves(trained, held_out))], steps))
    return charts


def _curves(trained: Points, held_out: Points) -> list[Curve]:
    """A line of training figures and dots of validation figures, of which either may be missing."""
    strokes = ((trained, LINE), (held_out, DOTS))
    return [Curve(points, stroke) for points, stroke in strokes if points]


def _stage(stage: StageLog) -> dict[str, Any]:
    """A stage's title, its facts in words, and its charts."""
    loss, rate, speed = (
        points_of(stage.train, key) for key in ("loss", "learning_rate", "questions_per_s")
    )
    held_out = points_of(stage.evaluate, "loss")
    last, steps = steps_of(stage)
    facts = [
        _count(steps, "step"),
        _count(stage.start.get("questions"), "question"),
        *(_count(stage.start.get(name), NOUNS[name]) for name in counts_shown([stage.start])),
    ]
    if last < steps:
        facts.append(f"the log ends at step {last:,}")
    charts = []
    if loss or held_out:
        keys = [Key(f"training, last {loss[-1][1]:.3g}", "line")] if loss else []
        if held_out:
            step, lowest = min(held_out, key=lambda point: point[1])
            keys.append(Key(f"validation, lowest {lowest:.3g} at {step:,}", "dots"))
        charts.append(chart("Loss", keys, [Panel("loss", _curves(loss, held_out))], steps))
    charts += [_score_chart(name, points, steps) for name, points in validation_scores(stage)]
    charts += _reward_charts(stage, steps)
    panels = [
        Panel(kind, [Curve(points, LINE)])
        for kind, points in (("learning rate", rate), ("questions/s", speed))
        if points
    ]
    if panels:
        keys = [Key(f"highest {max(value for _, value in rate):.3g}")] if rate else []
        if speed:
            mean = sum(value for _, value in speed) / len(speed)
            keys.append(Key(f"mean {mean:,.4g} questions/s"))
        charts.append(chart("Learning rate and speed", keys, panels, steps))
    title = f"Stage {stage.number + 1}" + (f": {stage.name}" if stage.name else "")
    return {"title": title, "facts": ", ".join(filter(None, facts)), "charts": charts}


def _score_chart(name: str, points: Points, steps: int) -> Chart:
    """The chart of validation scores by a metric, with the best."""
    title = metric_title(name)
    return chart(
        title[0].upper() + title[1:],
        [Key(f"validation, {best_score(name, points)}", "dots")],
        [score_panel(name, [Curve(points, DOTS)])],
        steps,
    )


def _tuning(stages: Sequence[dict[str, Any]]) -> list[tuple[Any, list[dict[str, Any]]]]:
    """The lines of each stage's tuning table, with their sum where there are several."""
    tables = []
    for stage in stages:
        rows = rows_of(stage.get("rows"))
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
        "thumbnail": thumbnail(
            media_named(run, row.get("image")),
            regions_drawn(row.get("size"), expected, [row.get("after")]),
        ),
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
