"""Two models' answers to the same rows: paired differences, and the rows that flipped.

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vlm_tune.errors import DataError
from vlm_tune.evaluation.assessment import clusters_of, compare_answers, measure, measured_score
from vlm_tune.evaluation.metrics import Answer

NAMED = 3
"""Rows that a message names."""


@dataclass(frozen=True)
class Flip:
    """A row that one model answers right and the other wrong."""

    id: str
    image: str
    question: str
    expected: str
    first: str
    second: str


@dataclass(frozen=True)
class Comparison:
    """Two models on the same rows; differences are of the second less the first.

    Attributes:
        first, second: the models' folders.
        n: the number of rows.
        metrics: {name: {first, second, difference, difference_low, difference_high, p, n, images}}.
        skipped: the reason for each metric that the two are not compared by.
        fixed: rows that the first answers wrong and the second right, by exact match.
        broken: rows that the first answers right and the second wrong.
        recipe: the recipes' differences, one a line; None where they are not known, as a recipe is
            missing or can't be read.
    """

    first: str
    second: str
    n: int
    metrics: dict[str, dict[str, Any]]
    skipped: dict[str, str]
    fixed: list[Flip]
    broken: list[Flip]
    recipe: list[str] | None

    def summary(self) -> dict[str, Any]:
        """The fields as a dictionary that JSON can hold."""
        return asdict(self)


def compare(
    first: Sequence[Answer],
    second: Sequence[Answer],
    *,
    names: tuple[str, str],
    metrics: Sequence[str] | None = None,
    limit: int | None = None,
    recipe: Sequence[str] | None = None,
) -> Comparison:
    """Compares two models' answers.

    Args:
        first: answers of one model.
        second: of the other, to the same rows in any order.
        names: the models' folders.
        metrics: the metrics; those of each row's form by default.
        limit: compare the first rows only, in the order of `first`.
        recipe: the differences of their recipes; None where they are not known.

    Raises:
        DataError: the rows differ.
        RecipeError: a name is no metric.
    """
    second = _in_order(first, second, names)[:limit]
    first = first[:limit]
    clusters = clusters_of(second)
    measured, skipped = measure(second, metrics)
    entries, left_out = compare_answers(measured, clusters, first)
    skipped |= {name: f"{names[0]}: {reason}" for name, reason in left_out.items()}
    seconds = {each.metric.name: measured_score(each, clusters) for each in measured}
    score = ("value", "low", "high")
    pairs = list(zip(first, second, strict=True))
    return Comparison(
        *names,
        len(first),
        {
            name: {
                "first": {key: entry[key] for key in score},
                "second": seconds[name],
                **{key: value for key, value in entry.items() if key not in score},
            }
            for name, entry in entries.items()
        },
        skipped,
        [_flip(*pair) for pair in pairs if pair[1].correct and not pair[0].correct],
        [_flip(*pair) for pair in pairs if pair[0].correct and not pair[1].correct],
        None if recipe is None else list(recipe),
    )


def _flip(first: Answer, second: Answer) -> Flip:
    return Flip(
        first.id, first.image, first.question, first.expected, first.generated, second.generated
    )


def _keys(answers: Sequence[Answer]) -> list[tuple[str, str, int]]:
    """The keys that tell rows apart: source, id, and how often they came before."""
    seen: dict[tuple[str, str], int] = {}
    keys = []
    for answer in answers:
        key = (answer.source, answer.id)
        seen[key] = seen.get(key, -1) + 1
        keys.append((*key, seen[key]))
    return keys


def _differ(one: Answer, other: Answer) -> bool:
    """Whether two answers are to another question, or have other references."""
    if (one.question, one.expected) != (other.question, other.expected):
        return True
    # Runs of earlier releases have written neither references nor their form.
    known = one.references.form and other.references.form
    return bool(known) and one.references != other.references


def _in_order(
    first: Sequence[Answer], second: Sequence[Answer], names: tuple[str, str]
) -> list[Answer]:
    """The second answers in the order of the first. Raises `DataError` if the rows differ."""
    keys = _keys(first)
    known = set(keys)
    others = dict(zip(_keys(second), second, strict=True))
    missing = [key for key in keys if key not in others]
    added = [key for key in others if key not in known]
    changed = [
        key
        for key, answer in zip(keys, first, strict=True)
        if key in others and _differ(others[key], answer)
    ]
    faults = [
        f"{len(rows):,} {what} ({', '.join(row_id for _, row_id, _ in rows[:NAMED])})"
        for what, rows in (
            (f"only in {names[0]}", missing),
            (f"only in {names[1]}", added),
            ("with another question or reference", changed),
        )
        if rows
    ]
    if faults:
        raise DataError(
            f"the rows differ: {'; '.join(faults)}; compare both on one file with --data"
        )
    return [others[key] for key in keys]
