"""The report of a sweep: its trials by score, and the scores over each searched value.

One HTML file without scripts or network, as the report of a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from vlm_tune.config.changes import recipe_changes
from vlm_tune.config.load import changed_recipe
from vlm_tune.rendering.charts import (
    BEST,
    COMPLETE,
    PRUNED,
    Axis,
    Chart,
    Cloud,
    Key,
    Stroke,
    scatter,
    swatch,
)
from vlm_tune.rendering.page import write_html
from vlm_tune.rendering.run_log import duration
from vlm_tune.rendering.scores_text import amount, is_share, metric_title
from vlm_tune.rendering.sweep_text import dimension_text, value_text
from vlm_tune.sweeping.records import REPORT, Sweep, Trial
from vlm_tune.sweeping.space import Choices

NAME = 12
"""Characters of a choice at a chart's axis."""


def write_sweep_report(sweep: Sweep) -> Path:
    """Writes report.html in the folder of a sweep, and returns its path."""
    metric = metric_title(sweep.metric or "score")
    better = "lowest" if sweep.lower_is_better else "highest"
    page = {
        "name": f"{sweep.recipe.name}: sweep",
        "note": f"{len(sweep.trials)} of {sweep.of} trials, by the {better} validation {metric}",
        "figures": _figures(sweep),
        "keys": list(sweep.space),
        "metric": metric,
        "rows": [_row(sweep, trial) for trial in sweep.ranked],
        "charts_of_keys": _charts(sweep),
        "search": [f"{key}: {dimension_text(dimension)}" for key, dimension in sweep.space.items()],
        "changes": _changes(sweep),
    }
    path = sweep.folder / REPORT
    write_html(path, "sweep.html", page)
    return path


def _figures(sweep: Sweep) -> list[tuple[str, str, str]]:
    """The headline: the best score, its values, and how the trials ended."""
    states = Counter(trial.state for trial in sweep.trials)
    counts = ", ".join(f"{count} {state}" for state, count in states.most_common())
    total = ("trials", str(len(sweep.trials)), counts)
    time = ("training time", duration(sum(trial.seconds for trial in sweep.trials)), "all trials")
    best = sweep.best
    if best is None:
        return [total, time]
    score = amount(sweep.metric or "", best.score)
    values = [
        (key, value_text(value), f"of trial {best.number}") for key, value in best.values.items()
    ]
    return [("best score", score, f"trial {best.number}"), *values, total, time]


def _row(sweep: Sweep, trial: Trial) -> dict[str, object]:
    """The table's row of a trial."""
    return {
        "number": trial.number,
        "best": trial == sweep.best,
        "figures": [
            amount(sweep.metric or "", trial.score),
            *(value_text(trial.values[key]) for key in sweep.space),
            "" if trial.step is None else f"{trial.step:,}",
            f"{trial.steps:,}",
            duration(trial.seconds),
        ],
        "state": trial.state,
        "reason": trial.reason,
    }


def _changes(sweep: Sweep) -> list[str]:
    """Lines on what the recipe of the best trial changes in the one of the sweep."""
    if sweep.best is None:
        return []
    best = changed_recipe(sweep.recipe, sweep.best.values)
    return [str(change) for change in recipe_changes(sweep.recipe, best)] or ["nothing"]


# --- charts ---------------------------------------------------------------------------------------


def _charts(sweep: Sweep) -> list[Chart]:
    """A scatter of the scores over the values of each key; none without a score."""
    scored = [trial for trial in sweep.trials if trial.score is not None]
    return [_chart(sweep, key, scored) for key in sweep.space] if scored else []


def _chart(sweep: Sweep, key: str, trials: Sequence[Trial]) -> Chart:
    """The scatter of one key."""
    dimension = sweep.space[key]
    share = is_share(sweep.metric or "")

    def point(trial: Trial) -> tuple[float, float]:
        value = trial.values[key]
        place = dimension.values.index(value) if isinstance(dimension, Choices) else value
        assert isinstance(place, int | float) and trial.score is not None
        return place, 100 * trial.score if share else trial.score

    groups: dict[str, tuple[Stroke, list[tuple[float, float]]]] = {
        "pruned or failed": (PRUNED, [point(t) for t in trials if t.state != "complete"]),
        "complete": (
            COMPLETE,
            [point(t) for t in trials if t.state == "complete" and t != sweep.best],
        ),
        "best": (BEST, [point(t) for t in trials if t == sweep.best]),
    }
    drawn = {name: group for name, group in groups.items() if group[1]}
    if isinstance(dimension, Choices):
        axis = Axis(key, names=[value_text(value)[:NAME] for value in dimension.values])
    else:
        axis = Axis(key, ends=(dimension.low, dimension.high), log=dimension.log)
    return scatter(
        metric_title(sweep.metric or "score"),
        [Key(name, swatch=swatch(stroke)) for name, (stroke, _) in drawn.items()],
        [Cloud(points, stroke) for stroke, points in drawn.values()],
        axis,
        share=share,
    )
