"""The report of several runs: their curves overlaid, their scores, and paired differences.

One HTML file without scripts or network, as the report of one run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vlm_tune.errors import DataError, Problem, RecipeError
from vlm_tune.evaluation.answer_files import ANSWERS_FILE, read_answers
from vlm_tune.evaluation.compare import Comparison, Flip, compare
from vlm_tune.evaluation.registry import METRICS
from vlm_tune.paths import is_file
from vlm_tune.rendering.charts import (
    RUN_STROKES,
    Chart,
    Curve,
    Key,
    Panel,
    Stroke,
    beside_swatch,
    chart,
    swatch,
)
from vlm_tune.rendering.media_text import medium_names
from vlm_tune.rendering.page import is_long, percent, thumbnail, write_html
from vlm_tune.rendering.report_scores import (
    group_table,
    interval_text,
    media_named,
    metric_rows,
    number_of,
    other_rows,
    paired_rows,
    score_notes,
)
from vlm_tune.rendering.run_log import (
    Points,
    StageLog,
    best_score,
    check_run_folder,
    duration,
    points_of,
    read_events,
    recipe_of,
    result_of,
    score_panel,
    stage_logs,
    start_facts,
    steps_of,
    validation_scores,
)
from vlm_tune.rendering.scores_text import metric_title
from vlm_tune.saved_models import recipe_differences

MOST = len(RUN_STROKES)
"""Runs of one report: there are as many strokes."""
FLIPS = 6
"""Rows shown that became right, and as many that became wrong."""
NAME = 32
"""Characters of a run's name in the key of a chart."""


@dataclass(frozen=True)
class _Run:
    """A run of the report: its letter, its stroke, and what its files hold."""

    letter: str
    stroke: Stroke
    folder: Path
    name: str
    facts: str
    result: dict[str, Any]
    stages: list[StageLog]
    notes: list[str]

    @property
    def label(self) -> Markup:
        """The run's letter beside a piece of its curve."""
        return beside_swatch(self.stroke, self.letter)

    @property
    def short(self) -> str:
        """The run's letter and the first characters of its name."""
        cut = self.name if len(self.name) <= NAME else self.name[: NAME - 1] + "…"
        return f"{self.letter} {cut}"


@dataclass(frozen=True)
class _Pair:
    """The first run and another one.

    Attributes:
        first, second: the runs.
        comparison: of their test answers; None where they can't be paired.
        problem: the reason for that; empty where there is a comparison.
    """

    first: _Run
    second: _Run
    comparison: Comparison | None
    problem: str = ""


def write_runs_report(folders: Sequence[Path], path: Path) -> Path:
    """Writes the report of several runs, from the files in their folders, and returns its path.

    The first is the one with which the others are compared. Parts whose files are missing are left
    out; answers that can't be paired are a note.

    Raises:
        RecipeError: a folder has no recipe.yaml, or there are more runs than `MOST`.
    """
    if len(folders) > MOST:
        message = f"a report overlays {MOST} runs at most, got {len(folders)}; leave some out"
        raise RecipeError([Problem("RUN", message)])
    for folder in folders:
        check_run_folder(folder)
    runs = [_read_run(folder, place) for place, folder in enumerate(folders)]
    pairs = [_pair(runs[0], run) for run in runs[1:]]
    page = {
        "name": " and ".join(run.name for run in runs) if len(runs) == 2 else f"{len(runs)} runs",
        "note": "runs by letter; differences are to run A, over the same test rows",
        "figures": [_figure(run) for run in runs],
        **medium_names([run.result for run in runs]),
        "runs": [(run.label, str(run.folder), run.facts, _cost(run.result)) for run in runs],
        "metrics": _by_title(runs, lambda run: metric_rows(run.result)),
        "paired": [
            (pair.second.label, row)
            for pair in pairs
            if pair.comparison is not None
            for row in paired_rows(pair.comparison.metrics)
        ],
        "letters": [run.label for run in runs],
        "groups": {kind: _groups(runs, kind) for kind in ("category", "source")},
        "others": [(run.label, row) for run in runs for row in other_rows(run.result)],
        "differences": [
            (pair.second.letter, _differences(pair.first.folder, pair.second.folder))
            for pair in pairs
        ],
        "stages": _stages(runs),
        "flips": [flips for pair in pairs if pair.comparison is not None for flips in _flips(pair)],
        "notes": [*_pair_notes(pairs), *(f"{run.letter}: {t}" for run in runs for t in run.notes)],
    }
    write_html(path, "runs.html", page)
    return path


def _read_run(folder: Path, place: int) -> _Run:
    _, values = recipe_of(folder)
    events = read_events(folder / "log.jsonl")
    result = result_of(folder)
    return _Run(
        "ABCDEF"[place],
        RUN_STROKES[place],
        folder,
        str(values.get("name") or folder.resolve().name),
        start_facts(values.get("seed"), events),
        result,
        stage_logs(events),
        score_notes(result),
    )


def _pair(first: _Run, second: _Run) -> _Pair:
    """Compares the test answers of two runs, by the metrics that both have."""
    for run in (first, second):
        if not is_file(run.folder / ANSWERS_FILE):
            return _Pair(first, second, None, f"{run.letter} has no test answers ({ANSWERS_FILE})")
    common = _metrics(first.result).keys() & _metrics(second.result).keys()
    # Not those of a user's function: a report runs none of their code.
    names = [name for name in _metrics(first.result) if name in common and name in METRICS]
    try:
        comparison = compare(
            read_answers(first.folder),
            read_answers(second.folder),
            names=(first.letter, second.letter),
            metrics=names or None,
        )
    except DataError as error:
        return _Pair(first, second, None, str(error))
    return _Pair(first, second, comparison)


def _metrics(result: dict[str, Any]) -> dict[str, Any]:
    metrics = result.get("metrics")
    return metrics if isinstance(metrics, dict) else {}


def _pair_notes(pairs: Sequence[_Pair]) -> list[str]:
    """The reasons why runs, or metrics of theirs, are not paired."""
    notes = [
        f"no paired differences of {pair.second.letter} to {pair.first.letter}: {pair.problem}"
        for pair in pairs
        if pair.problem
    ]
    notes += [
        f"{name} of {pair.second.letter} is not paired: {reason}"
        for pair in pairs
        if pair.comparison is not None
        for name, reason in pair.comparison.skipped.items()
    ]
    return notes


# --- scores ---------------------------------------------------------------------------------------


def _figure(run: _Run) -> tuple[Markup, str, str]:
    """A run's headline: its name, test accuracy, and the interval of that."""
    label = beside_swatch(run.stroke, f"{run.letter} {run.name}")
    accuracy = number_of(run.result.get("accuracy"))
    if accuracy is None:
        return label, "–", "no test scores"
    ends = interval_text("exact_match", _metrics(run.result).get("exact_match"))
    return label, percent(accuracy, 2), "test accuracy" + (f", 95% interval {ends}" if ends else "")


def _cost(result: dict[str, Any]) -> list[str]:
    """A run's training time and peak memory as text."""
    seconds = number_of(result.get("seconds"))
    memory = number_of(result.get("peak_gpu_memory_mb")) or number_of(result.get("peak_memory_mb"))
    return [
        "" if seconds is None else duration(seconds),
        "" if memory is None else f"{memory:,.0f} MB",
    ]


def _by_title(
    runs: Sequence[_Run], rows: Callable[[_Run], Iterable[tuple[str, list[str]]]]
) -> dict[str, list[tuple[Markup, list[str]]]]:
    """The rows of all runs by their title, in the order of the first run that has it."""
    tables: dict[str, list[tuple[Markup, list[str]]]] = {}
    for run in runs:
        for title, figures in rows(run):
            tables.setdefault(title, []).append((run.label, figures))
    return tables


def _groups(runs: Sequence[_Run], kind: str) -> list[tuple[str, list[str]]]:
    """Each group and its accuracy in each run; none where all runs have but one group."""
    scores = [
        {
            str(name): percent(accuracy, 2)
            for name, _, accuracy in group_table(run.result, run.result.get(f"by_{kind}")).rows
        }
        for run in runs
    ]
    names = list(dict.fromkeys(name for each in scores for name in each))
    return [(name, [each.get(name, "–") for each in scores]) for name in names if len(names) > 1]


def _differences(first: Path, second: Path) -> list[str]:
    changes = recipe_differences(first / "recipe.yaml", second / "recipe.yaml")
    if changes is None:
        return ["not known: a recipe can't be read"]
    return changes or ["none but name and output folder"]


# --- flipped rows ---------------------------------------------------------------------------------


def _flips(pair: _Pair) -> list[dict[str, Any]]:
    """The rows that one of two runs alone answers right, as two lists of cards."""
    comparison = pair.comparison
    assert comparison is not None
    first, second = pair.first.letter, pair.second.letter
    sides = (
        (f"Right in {second}, wrong in {first}", comparison.fixed, ("wrong", "right")),
        (f"Right in {first}, wrong in {second}", comparison.broken, ("right", "wrong")),
    )
    lists = []
    for title, rows, verdicts in sides:
        if not rows:
            continue
        chosen = _spread(rows)[:FLIPS]
        shown = f"{len(chosen)} of " if len(chosen) < len(rows) else ""
        lists.append(
            {
                "title": title,
                "note": f"{shown}{len(rows):,} of {comparison.n:,} rows, by exact match",
                "rows": [_card(pair, row, verdicts) for row in chosen],
            }
        )
    return lists


def _spread(rows: Sequence[Flip]) -> list[Flip]:
    """The rows with the first about each image before the others."""
    first = {row.image: row for row in reversed(rows)}
    return sorted(rows, key=lambda row: first[row.image] is not row)


def _card(pair: _Pair, row: Flip, verdicts: tuple[str, str]) -> dict[str, Any]:
    letters = (pair.first.letter, pair.second.letter)
    answers = (row.first, row.second)
    return {
        "question": row.question,
        "expected": row.expected,
        "answers": list(zip(letters, answers, verdicts, strict=True)),
        "thumbnail": thumbnail(media_named(pair.first.folder, row.image)),
        "long": is_long([row.question, row.expected, *answers]),
    }


# --- curves ---------------------------------------------------------------------------------------


def _stages(runs: Sequence[_Run]) -> list[dict[str, Any]]:
    """The charts of each stage, with the curves of all runs that have a stage of its name."""
    stages: dict[str, list[tuple[_Run, StageLog]]] = {}
    for run in runs:
        for stage in run.stages:
            stages.setdefault(stage.name or f"stage {stage.number + 1}", []).append((run, stage))
    return [
        {
            "title": f"Curves: {name}",
            "facts": "steps: "
            + ", ".join(f"{run.letter} {steps_of(stage)[1]:,}" for run, stage in logs),
            "charts": _charts(logs),
        }
        for name, logs in stages.items()
    ]


def _charts(logs: Sequence[tuple[_Run, StageLog]]) -> list[Chart]:
    """The charts of one stage: losses, validation scores and learning rate."""
    steps = max(steps_of(stage)[1] for _, stage in logs)

    def lowest(points: Points) -> str:
        step, value = min(points, key=lambda point: point[1])
        return f"lowest {value:.3g} at {step:,}"

    charts = [
        _overlay(
            "Training loss",
            [(run, points_of(stage.train, "loss")) for run, stage in logs],
            lambda points: f"last {points[-1][1]:.3g}",
            lambda curves: Panel("loss", curves),
            steps,
        ),
        _overlay(
            "Validation loss",
            [(run, points_of(stage.evaluate, "loss")) for run, stage in logs],
            lowest,
            lambda curves: Panel("loss", curves),
            steps,
        ),
    ]
    scores = [(run, dict(validation_scores(stage))) for run, stage in logs]
    for name in dict.fromkeys(name for _, by_metric in scores for name in by_metric):
        title = metric_title(name)
        charts.append(
            _overlay(
                f"Validation: {title}",
                [(run, by_metric.get(name, [])) for run, by_metric in scores],
                lambda points, name=name: best_score(name, points),
                lambda curves, name=name: score_panel(name, curves),
                steps,
            )
        )
    charts.append(
        _overlay(
            "Learning rate",
            [(run, points_of(stage.train, "learning_rate")) for run, stage in logs],
            lambda points: f"highest {max(value for _, value in points):.3g}",
            lambda curves: Panel("score", curves),
            steps,
        )
    )
    return [each for each in charts if each is not None]


def _overlay(
    title: str,
    logs: Sequence[tuple[_Run, Points]],
    words: Callable[[Points], str],
    panel: Callable[[Sequence[Curve]], Panel],
    steps: int,
) -> Chart | None:
    """One chart with a curve for each run that has points; None where none has.

    Args:
        title: the chart's title.
        logs: the runs and their points.
        words: says the figure of a curve in the key.
        panel: puts curves into a panel.
        steps: the last step of the axis.
    """
    drawn = [(run, points) for run, points in logs if points]
    if not drawn:
        return None
    keys = [
        Key(f"{run.short}: {words(points)}", "run", swatch(run.stroke)) for run, points in drawn
    ]
    curves = [Curve(points, run.stroke) for run, points in drawn]
    return chart(title, keys, [panel(curves)], steps)
