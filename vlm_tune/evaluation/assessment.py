"""The whole assessment of scored answers: metrics, intervals, classes, baselines.

This module does not import torch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_tune.errors import DataError
from vlm_tune.evaluation.classes import class_table
from vlm_tune.evaluation.intervals import (
    cluster_numbers,
    cluster_sums,
    difference,
    interval,
)
from vlm_tune.evaluation.metrics import Answer, Scores
from vlm_tune.evaluation.registry import (
    METRICS,
    Metric,
    default_metrics,
    find_metric,
    lower_is_better,
)


@dataclass(frozen=True)
class Measured:
    """A metric of answers.

    Attributes:
        metric: the metric.
        rows: the indices of the answers that it scores.
        statistics: their statistics [rows, S].
    """

    metric: Metric
    rows: np.ndarray
    statistics: Any


def assess(scores: Scores, names: Sequence[str] | None = None) -> list[Measured]:
    """Adds metrics, their intervals and the confusion matrix to scores, as `add_metrics`."""
    measured = add_metrics(scores, names)
    scores.classes = class_table([(answer.generated, answer.expected) for answer in scores.answers])
    return measured


def add_metrics(scores: Scores, names: Sequence[str] | None = None) -> list[Measured]:
    """Adds metrics and their intervals to scores, of all rows and of each group.

    A metric of a user's own that fails on a row is skipped with the reason.

    Args:
        scores: with their answers.
        names: the metrics; those of each row's form by default.

    Returns:
        The statistics of the answers, with which baselines are compared.

    Raises:
        RecipeError: a name is no metric.
    """
    answers = scores.answers
    measured, scores.skipped = measure(answers, names)
    clusters = clusters_of(answers)
    everything = np.arange(len(answers))
    scores.metrics = _entries(measured, everything, clusters)
    for groups, name_of in (
        (scores.by_category, lambda answer: answer.category),
        (scores.by_source, lambda answer: answer.source),
    ):
        for name, members in _members(answers, name_of).items():
            if name in groups:
                groups[name]["metrics"] = _entries(measured, members, clusters)
    return measured


def measure(
    answers: Sequence[Answer], names: Sequence[str] | None
) -> tuple[list[Measured], dict[str, str]]:
    """The statistics of answers by each metric, and the reasons why others have none.

    Raises `RecipeError` for a name that is no metric.
    """
    names = None if names is None else list(dict.fromkeys(names))
    wanted: dict[str, list[int]] = defaultdict(list)
    for row, answer in enumerate(answers):
        for name in names if names is not None else default_metrics(answer):
            wanted[name].append(row)
    order = names if names is not None else [name for name in METRICS if name in wanted]
    measured = []
    skipped = {}
    for name in order:
        metric = find_metric(name)
        rows = [row for row in wanted[name] if metric.applies(answers[row])]
        if not rows:
            skipped[name] = f"no row has {metric.needs}"
            continue
        try:
            statistics = metric.statistics([answers[row] for row in rows])
        except DataError as error:
            skipped[name] = str(error)
            continue
        measured.append(Measured(metric, np.array(rows), statistics))
    return measured, skipped


def clusters_of(answers: Sequence[Answer]) -> np.ndarray:
    """The number of each answer's group of rows that share an image, int64[N]."""
    return cluster_numbers([answer.images for answer in answers])


def _members(answers: Sequence[Answer], name_of: Callable[[Answer], str]) -> dict[str, np.ndarray]:
    groups: dict[str, list[int]] = defaultdict(list)
    for row, answer in enumerate(answers):
        groups[name_of(answer)].append(row)
    return {name: np.array(rows) for name, rows in groups.items()}


def _entries(
    measured: Sequence[Measured], members: np.ndarray, clusters: np.ndarray
) -> dict[str, dict[str, Any]]:
    """The entry of each metric for some of the answers; metrics that score none are left out."""
    entries = {}
    for each in measured:
        inside = np.isin(each.rows, members)
        if inside.any():
            sums = _sums(each.statistics[inside], clusters[each.rows[inside]])
            entries[each.metric.name] = {
                **score_entry(each.metric, sums),
                "n": int(inside.sum()),
                "images": sums.shape[0],
            }
    return entries


def _sums(statistics: Any, clusters: np.ndarray) -> Any:
    return cluster_sums(statistics, np.unique(clusters, return_inverse=True)[1])


def score_entry(metric: Metric, sums: Any) -> dict[str, float | None]:
    """A metric's value and the ends of its interval, of the statistics of each cluster.

    The value is None where it is not finite, as of a model that diverged.
    """
    totals = np.asarray(sums.sum(axis=0)).ravel()
    value = float(metric.value(totals))
    if not math.isfinite(value):
        return {"value": None, "low": None, "high": None}
    ends = interval(sums, metric.value, top=metric.top, log=metric.log)
    low, high = (None, None) if ends is None else ends
    return {"value": value, "low": low, "high": high}


def measured_score(measured: Measured, clusters: np.ndarray) -> dict[str, float | None]:
    """As `score_entry`, of measured answers and the clusters of all answers."""
    return score_entry(measured.metric, _sums(measured.statistics, clusters[measured.rows]))


def compare_answers(
    measured: Sequence[Measured], clusters: np.ndarray, others: Sequence[Answer]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The scores of other answers to the same questions, and how far the model's are above them.

    Args:
        measured: the metrics of the model's answers.
        clusters: the number of each answer's group of rows that share an image.
        others: answers of a baseline, or another model, in the same order.

    Returns:
        {metric: {value, low, high, n, images, difference, difference_low, difference_high, p}} with
        the scores of `others`, and the differences of the model's answers less `others`; and the
        reasons why others are not compared by some of the metrics.
    """
    entries = {}
    skipped = {}
    for each in measured:
        metric = each.metric
        rows = each.rows
        other_rows = [others[row] for row in rows]
        if not all(map(metric.applies, other_rows)):
            skipped[metric.name] = f"not every row has {metric.needs}"
            continue
        try:
            other_statistics = metric.statistics(other_rows)
        except DataError as error:
            skipped[metric.name] = str(error)
            continue
        inside = clusters[rows]
        sums = _sums(each.statistics, inside)
        other_sums = _sums(other_statistics, inside)
        gap = difference(sums, other_sums, metric.value, top=metric.top, log=metric.log)
        entries[metric.name] = {
            **score_entry(metric, other_sums),
            "n": len(rows),
            "images": sums.shape[0],
            "difference": gap.value,
            "difference_low": gap.low,
            "difference_high": gap.high,
            "p": gap.p,
        }
    return entries, skipped


def better(metric: str, entry: Mapping[str, Any]) -> bool | None:
    """Whether the model is better than a baseline by a metric; None where it is not known.

    It is known where the paired test's p-value is under 0.05; there is none where a score is not
    finite.
    """
    if entry["p"] is None or entry["p"] >= 0.05:
        return None
    return entry["difference"] < 0 if lower_is_better(metric) else entry["difference"] > 0
