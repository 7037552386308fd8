"""Two models' answers to the same rows: paired differences, and the rows that flipped.

This module does not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vlm_tune.data.types import References
from vlm_tune.errors import DataError
from vlm_tune.evaluation.assessment import clusters_of, compare_answers, measure, measured_score
from vlm_tune.evaluation.metrics import Answer

ANSWERS_FILE = "answers.jsonl"
"""The test answers in a run's folder."""
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
        fixed: rows that the first answers wrong and the second right, by exact match.
        broken: rows that the first answers right and the second wrong.
        recipe: the recipes' differences, one a line; empty where a model lies in no run.
    """

    first: str
    second: str
    n: int
    metrics: dict[str, dict[str, Any]]
    fixed: list[Flip]
    broken: list[Flip]
    recipe: list[str]

    def summary(self) -> dict[str, Any]:
        """The fields as a dictionary that JSON can hold."""
        return asdict(self)


def read_answers(run: Path) -> list[Answer]:
    """Reads a run's test answers. Raises `DataError` where there are none or a line is damaged."""
    path = run / ANSWERS_FILE
    try:
        # Of all that ends a line elsewhere, an answer's JSON may hold some.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError):
        raise DataError(
            f"has no {ANSWERS_FILE}, which a run writes once its test part is scored; "
            "to compare models on a file of rows give --data",
            source=str(run),
        ) from None
    answers = []
    for number, line in enumerate(filter(None, lines), 1):
        try:
            answers.append(answer_from(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise DataError("is no scored answer", source=str(path), row=number) from None
    if not answers:
        raise DataError("holds no answers", source=str(path))
    return answers


def answer_from(entry: dict[str, Any]) -> Answer:
    """An answer from its JSON object. Raises `TypeError` or `KeyError` for another object."""
    references: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in (entry.get("references") or {}).items()
    }
    known = {field.name for field in fields(Answer)} - {"references", "images"}
    images = entry.get("images", [entry["image"]] if entry["image"] else [])
    return Answer(
        **{name: value for name, value in entry.items() if name in known},
        images=tuple(images),
        references=References(**references),
    )


def compare(
    first: Sequence[Answer],
    second: Sequence[Answer],
    *,
    names: tuple[str, str],
    metrics: Sequence[str] | None = None,
    recipe: Sequence[str] = (),
) -> Comparison:
    """Compares two models' answers.

    Args:
        first: answers of one model.
        second: of the other, to the same rows in any order.
        names: the models' folders.
        metrics: the metrics; those of each row's form where not given.
        recipe: the differences of their recipes.

    Raises:
        DataError: the rows differ.
        RecipeError: a name is no metric.
    """
    second = _in_order(first, second, names)
    clusters = clusters_of(second)
    measured, _ = measure(second, metrics)
    entries = compare_answers(measured, clusters, first)
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
        [_flip(*pair) for pair in pairs if pair[1].correct and not pair[0].correct],
        [_flip(*pair) for pair in pairs if pair[0].correct and not pair[1].correct],
        list(recipe),
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


def _in_order(
    first: Sequence[Answer], second: Sequence[Answer], names: tuple[str, str]
) -> list[Answer]:
    """The second answers in the order of the first. Raises `DataError` if the rows differ."""
    keys = _keys(first)
    others = dict(zip(_keys(second), second, strict=True))
    missing = [key for key in keys if key not in others]
    added = [key for key in others if key not in set(keys)]
    changed = [
        key
        for key, answer in zip(keys, first, strict=True)
        if key in others
        and (others[key].question, others[key].expected) != (answer.question, answer.expected)
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
