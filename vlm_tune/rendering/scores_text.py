"""An evaluation's scores as tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlm_tune.evaluation.assessment import better
from vlm_tune.evaluation.baselines import baseline_title
from vlm_tune.evaluation.compare import Comparison
from vlm_tune.evaluation.registry import METRICS
from vlm_tune.quoting import escaped
from vlm_tune.rendering.media_text import medium_noun

SHOWN = 2
"""Metrics by which groups and baselines are shown; result.json has all."""


ACCURACIES = "rewards/accuracies"
"""The share of pairs whose chosen answer has the higher reward; of KTO, of answers whose reward
has the sign of their label."""
MARGINS = "rewards/margins"
"""The mean difference between the rewards of chosen and rejected answers."""
REWARD = "reward"
"""The mean reward of sampled answers."""


def metric_title(name: str) -> str:
    """A metric's name in tables."""
    return METRICS[name].title if name in METRICS else name


def is_share(name: str) -> bool:
    """Whether a metric is a share, which is shown in percent."""
    return name == ACCURACIES or (name in METRICS and METRICS[name].top == 1.0)


def shown_figures(figures: Mapping[str, float | None]) -> dict[str, float | None]:
    """The figures that a line on a validation has room for: two of a preference stage's.

    Where all answers are liked, or all are disliked, there is no margin.
    """
    if ACCURACIES not in figures:
        return dict(figures)
    return {name: figures[name] for name in (ACCURACIES, MARGINS) if name in figures}


def amount(name: str, number: float | None, *, signed: bool = False) -> str:
    """A metric's score or difference as text."""
    if number is None:
        return "-"
    sign = "+" if signed else ""
    return f"{100 * number:{sign}.2f}%" if is_share(name) else f"{number:{sign}.4g}"


def ends(name: str, low: float | None, high: float | None, *, signed: bool = False) -> str:
    """An interval as text."""
    if low is None or high is None:
        return "-"
    first, last = amount(name, low, signed=signed), amount(name, high, signed=signed)
    return f"{first.removesuffix('%')} to {last}"


def chance(p: float | None) -> str:
    """A p-value as text."""
    if p is None:
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def score_tables(summary: Mapping[str, Any]) -> list[Table]:
    """The tables of a summary of `Scores`: metrics, groups, and baselines where there are some."""
    tables = [_metrics(summary), _groups(summary), *_baselines(summary), _others(summary)]
    return [table for table in tables if table is not None]


def score_notes(summary: Mapping[str, Any]) -> list[str]:
    """Lines on what the tables lack."""
    skipped = summary.get("skipped", {})
    return [
        *(f"{name} is not computed: {reason}" for name, reason in skipped.items()),
        *summary.get("notes", ()),
    ]


def _table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in texts:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _metrics(summary: Mapping[str, Any]) -> Table | None:
    metrics = summary.get("metrics")
    if not metrics:
        return None
    media = f"{medium_noun(summary)}s"
    table = _table("scores", ["metric"], ["score", "95% interval", "rows", media])
    for name, entry in metrics.items():
        table.add_row(
            Text(escaped(metric_title(name))),
            amount(name, entry["value"]),
            ends(name, entry["low"], entry["high"]),
            f"{entry['n']:,}",
            f"{entry['images']:,}",
        )
    return table


def main_metrics(summary: Mapping[str, Any]) -> list[str]:
    """The metrics by which groups and baselines are shown: the first ones."""
    return list(summary.get("metrics", {}))[:SHOWN]


def _groups(summary: Mapping[str, Any]) -> Table | None:
    """Scores by category, and by source where there are several; all rows at the end."""
    by_source = summary["by_source"]
    kinds = (
        ("category", summary["by_category"]),
        ("source", by_source if len(by_source) > 1 else {}),
    )
    names = main_metrics(summary)
    if summary.get("metrics") and not any(groups for _, groups in kinds):
        return None
    added = [title for name in names for title in (metric_title(name), "95% interval")]
    table = _table(
        "exact match" if not names else "by group", ["by", ""], [*(added or ["accuracy"]), "n"]
    )
    for kind, groups in kinds:
        for group, entry in groups.items():
            cells = _cells(entry.get("metrics", {}), names) or [f"{entry['accuracy']:.2%}"]
            table.add_row(kind, Text(escaped(group)), *cells, f"{entry['n']:,.0f}")
        table.add_section()
    cells = _cells(summary.get("metrics", {}), names) or [f"{summary['accuracy']:.2%}"]
    table.add_row("all", "", *cells, f"{summary['n']:,}")
    return table


def _cells(metrics: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    cells = []
    for name in names:
        entry = metrics.get(name)
        cells += (
            ["-", "-"]
            if entry is None
            else [amount(name, entry["value"]), ends(name, entry["low"], entry["high"])]
        )
    return cells


VERDICTS = {True: "yes", False: "no: worse", None: "not shown"}
"""Whether the model beats a baseline, by the paired test."""


def _baselines(summary: Mapping[str, Any]) -> Iterator[Table]:
    """A table for each of the main metrics."""
    baselines = summary.get("baselines", {})
    for name in main_metrics(summary):
        table = _table(
            f"baselines by {escaped(metric_title(name))}",
            ["baseline"],
            ["score", "model above by", "95% interval", "p"],
        )
        table.add_column("beaten")
        for baseline, metrics in baselines.items():
            if name not in metrics:
                continue
            entry = metrics[name]
            table.add_row(
                baseline_title(baseline, summary.get("modality")),
                amount(name, entry["value"]),
                amount(name, entry["difference"], signed=True),
                ends(name, entry["difference_low"], entry["difference_high"], signed=True),
                chance(entry["p"]),
                VERDICTS[better(name, entry)],
            )
        if table.row_count:
            yield table


def _others(summary: Mapping[str, Any]) -> Table | None:
    """Scores on other tasks before and after training."""
    table = _table(
        "other tasks, before and after training",
        ["task", "metric"],
        ["before", "after", "change", "95% interval", "p", "rows"],
    )
    for task, compared in (summary.get("also") or {}).items():
        for name, entry in compared["metrics"].items():
            table.add_row(Text(escaped(task)), *_paired(name, entry))
    return table if table.row_count else None


def _paired(name: str, entry: Mapping[str, Any]) -> list[Text | str]:
    """The cells of a paired comparison: metric, both scores, difference, interval, p and rows."""
    return [
        Text(escaped(metric_title(name))),
        amount(name, entry["first"]["value"]),
        amount(name, entry["second"]["value"]),
        amount(name, entry["difference"], signed=True),
        ends(name, entry["difference_low"], entry["difference_high"], signed=True),
        chance(entry["p"]),
        f"{entry['n']:,}",
    ]


# --- comparisons ----------------------------------------------------------------------------------


def print_comparison(console: Console, comparison: Comparison, flips: int) -> None:
    """Prints a comparison of two models: scores, flipped rows and differences of the recipes.

    `flips` rows are shown that became right, and as many that became wrong.
    """
    lines = [f"A: {comparison.first}", f"B: {comparison.second}"]
    _print_lines(console, lines)
    table = _table("paired scores", ["metric"], ["A", "B", "B less A", "95% interval", "p", "rows"])
    for name, entry in comparison.metrics.items():
        table.add_row(*_paired(name, entry))
    console.print(table)
    _print_lines(
        console,
        [f"{name} is not computed: {reason}" for name, reason in comparison.skipped.items()],
    )
    for title, rows in (
        ("right in B alone", comparison.fixed),
        ("right in A alone", comparison.broken),
    ):
        shown = [
            f"  {row.id}: {row.question} (expected {row.expected}) A: {row.first} B: {row.second}"
            for row in rows[:flips]
        ]
        more = [f"  and {len(rows) - flips:,} more"] if len(rows) > flips else []
        _print_lines(console, [f"{title}: {len(rows):,} of {comparison.n:,} rows", *shown, *more])
    differences = (
        ["  not known: a recipe is missing or can't be read"]
        if comparison.recipe is None
        else [f"  {line}" for line in comparison.recipe] or ["  none"]
    )
    _print_lines(console, ["differences of the recipes, A -> B:", *differences])


def _print_lines(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        # Rows may hold line breaks and control sequences.
        console.print(Text(escaped(line)), soft_wrap=True)
