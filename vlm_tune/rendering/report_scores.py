"""The report's part on the test scores: metrics, groups, baselines, classes, and worst answers.

It is made from a run's files, which may be cut or edited: what can't be read is left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from vlm_tune.data.types import Media, Slice
from vlm_tune.evaluation.assessment import better
from vlm_tune.evaluation.baselines import baseline_title
from vlm_tune.evaluation.texts import levenshtein, normalise
from vlm_tune.rendering.page import is_long, percent, regions_drawn, thumbnail
from vlm_tune.rendering.scores_text import chance, is_share, main_metrics, metric_title

WORST = 24
"""Wrong answers that the report shows."""
READ = 20_000
"""Test answers from which they are chosen."""
COMPARED = 200
"""Characters of an answer that are compared with the reference."""
SLICE = re.compile(r"(.+)\[(\d{1,18}):(\d{1,18})\]", re.DOTALL)
"""The name of an image that is a part of a file."""
BEATEN = {True: "yes", False: "no, it is worse", None: "not shown"}


def number_of(value: Any) -> float | None:
    """A finite number; None for anything else, such as an integer beyond the largest float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def count_of(value: Any) -> str:
    """A whole number as text; "" for a value that is no number."""
    number = number_of(value)
    return "" if number is None else f"{number:,.0f}"


def _shown(name: str, value: Any, *, signed: bool = False) -> str:
    """A metric's score, or with `signed` a difference, as text; "" for a value that is none."""
    number = number_of(value)
    if number is None:
        return ""
    text = percent(abs(number), 2) if is_share(name) else f"{abs(number):.4g}"
    sign = "−" if number < 0 else "+" if signed else ""
    return sign + text


def _ends(name: str, entry: dict[str, Any], keys: tuple[str, str], *, signed: bool = False) -> str:
    low, high = (_shown(name, entry.get(key), signed=signed) for key in keys)
    return f"{low} to {high}" if low and high else ""


def interval_text(name: str, entry: Any) -> str:
    """The 95% interval of a metric's entry in result.json; "" where there is none."""
    return _ends(name, entry, ("low", "high")) if isinstance(entry, dict) else ""


def _entries(metrics: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The metrics of result.json whose value can be read."""
    for name, entry in metrics.items() if isinstance(metrics, dict) else ():
        if isinstance(entry, dict) and number_of(entry.get("value")) is not None:
            yield name, entry


def metric_rows(result: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Each metric's title, and its score, interval, rows and images."""
    return [
        (
            metric_title(name),
            [
                _shown(name, entry["value"]),
                interval_text(name, entry),
                count_of(entry.get("n")),
                count_of(entry.get("images")),
            ],
        )
        for name, entry in _entries(result.get("metrics"))
    ]


@dataclass(frozen=True)
class GroupTable:
    """Scores by category or source.

    Attributes:
        columns: the titles of the figures.
        rows: of each group its name, figures, and accuracy as a share.
    """

    columns: list[str]
    rows: list[tuple[str, list[str], float]]


def group_table(result: dict[str, Any], groups: Any) -> GroupTable:
    """The scores of groups by the main metrics, or by accuracy alone where there are none."""
    metrics = dict(_entries(result.get("metrics")))
    others = [name for name in main_metrics({"metrics": metrics}) if name != "exact_match"]
    whole = "exact_match" in metrics
    columns = ["accuracy", *(["95% interval"] if whole else [])]
    columns += [title for name in others for title in (metric_title(name), "95% interval")]
    rows = []
    for name, entry in groups.items() if isinstance(groups, dict) else ():
        accuracy = number_of(entry.get("accuracy")) if isinstance(entry, dict) else None
        if accuracy is None:
            continue
        metrics_here = dict(_entries(entry.get("metrics")))
        figures = [percent(accuracy)]
        figures += [interval_text("exact_match", metrics_here.get("exact_match"))] if whole else []
        for other in others:
            score = metrics_here.get(other, {})
            figures += [_shown(other, score.get("value")), interval_text(other, score)]
        rows.append((name, [*figures, count_of(entry.get("n"))], accuracy))
    return GroupTable([*columns, "questions"], rows)


def baseline_rows(result: dict[str, Any]) -> list[list[str]]:
    """Each baseline's name, metric, score, difference, interval, p-value and verdict."""
    rows = []
    baselines = result.get("baselines")
    for baseline, metrics in baselines.items() if isinstance(baselines, dict) else ():
        known = dict(_entries(metrics))
        for name in main_metrics({"metrics": dict(_entries(result.get("metrics")))}):
            entry = known.get(name, {})
            p = number_of(entry.get("p"))
            difference = number_of(entry.get("difference"))
            if p is None or difference is None:
                continue
            ends = ("difference_low", "difference_high")
            rows.append(
                [
                    baseline_title(baseline, result.get("modality")),
                    metric_title(name),
                    _shown(name, entry["value"]),
                    _shown(name, difference, signed=True),
                    _ends(name, entry, ends, signed=True),
                    chance(p),
                    BEATEN[better(name, {"p": p, "difference": difference})],
                ]
            )
    return rows


def paired_rows(metrics: Any) -> list[list[str]]:
    """Each compared metric's title, both scores, difference, interval, p-value and rows."""
    rows = []
    for name, entry in metrics.items() if isinstance(metrics, dict) else ():
        if not isinstance(entry, dict):
            continue
        scores = [
            _shown(name, side.get("value")) if isinstance(side := entry.get(key), dict) else ""
            for key in ("first", "second")
        ]
        ends = ("difference_low", "difference_high")
        p = number_of(entry.get("p"))
        rows.append(
            [
                metric_title(name),
                *scores,
                _shown(name, entry.get("difference"), signed=True),
                _ends(name, entry, ends, signed=True),
                "" if p is None else chance(p),
                count_of(entry.get("n")),
            ]
        )
    return rows


def other_rows(result: dict[str, Any]) -> list[list[str]]:
    """The scores on other tasks before and after training: the task, then as `paired_rows`."""
    also = result.get("also")
    return [
        [str(task), *row]
        for task, compared in (also.items() if isinstance(also, dict) else ())
        for row in paired_rows(compared.get("metrics") if isinstance(compared, dict) else None)
    ]


def score_notes(result: dict[str, Any]) -> list[str]:
    """Lines on metrics and baselines that the scores lack."""
    notes, skipped = result.get("notes"), result.get("skipped")
    lines = [
        f"{name} is not computed: {reason}"
        for name, reason in (skipped.items() if isinstance(skipped, dict) else ())
    ]
    return [*lines, *(str(note) for note in (notes if isinstance(notes, list) else ()))]


# --- classes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassTables:
    """The confusion matrix and the scores of each class.

    Attributes:
        labels: the classes.
        matrix: of each class the (count, share) of each answer; the last is no class.
        rows: of each class its precision, recall, F1 and rows as text.
    """

    labels: list[str]
    matrix: list[list[tuple[str, float]]]
    rows: list[list[str]]


def class_tables(result: dict[str, Any]) -> ClassTables | None:
    """The tables of classes; None where result.json has none that can be read."""
    classes = result.get("classes")
    if not isinstance(classes, dict):
        return None
    labels, matrix, rows = (classes.get(key) for key in ("labels", "matrix", "rows"))
    if not all(isinstance(part, list) for part in (labels, matrix, rows)):
        return None
    assert isinstance(labels, list) and isinstance(matrix, list) and isinstance(rows, list)
    size = len(labels)
    sound = len(matrix) == len(rows) == size and all(
        isinstance(row, list) and len(row) == size + 1 for row in matrix
    )
    if not sound or not all(isinstance(row, dict) for row in rows):
        return None
    return ClassTables(
        [str(label) for label in labels],
        [_shares(row) for row in matrix],
        [
            [
                *(_shown("exact_match", row.get(key)) for key in ("precision", "recall", "f1")),
                count_of(row.get("n")),
            ]
            for row in rows
        ],
    )


def _shares(row: Sequence[Any]) -> list[tuple[str, float]]:
    """Counts as text, with their share of the row; an empty text for 0."""
    counts = [max(number_of(value) or 0.0, 0.0) for value in row]
    total = sum(counts) or 1.0
    return [(f"{count:,.0f}" if count else "", count / total) for count in counts]


# --- answers --------------------------------------------------------------------------------------


def worst_answers(run: Path) -> tuple[list[dict[str, Any]], str]:
    """The test answers that are furthest from their reference, and their number in words.

    Each is on another image, as far as there are enough. Similarity is that of the texts' edit
    distance.
    """
    answers, whole = _answers(run / "answers.jsonl")
    wrong = [answer for answer in answers if answer.get("correct") is False]
    wrong.sort(key=lambda answer: _similarity(answer["generated"], answer["expected"]))
    seen: set[str] = set()
    first, repeated = [], []
    for answer in wrong:
        image = str(answer.get("image"))
        (repeated if image in seen else first).append(answer)
        seen.add(image)
    chosen = [*first, *repeated][:WORST]
    shown = f"{len(chosen)} of " if len(chosen) < len(wrong) else ""
    part = "the test part" if whole else f"the first {READ:,} of the test part"
    note = f"{shown}{len(wrong):,} wrong answers of {part}, the furthest first"
    return [_card(run, answer) for answer in chosen], note


def _answers(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The first answers of a run that have texts, and whether the file holds no more.

    Lines that can't be read are skipped.
    """
    answers: list[dict[str, Any]] = []
    try:
        file = path.open(encoding="utf-8", errors="replace")
    except OSError:
        return answers, True
    with file:
        for line in islice(file, READ):
            try:
                answer = json.loads(line)
            except ValueError:
                continue
            texts = ("question", "expected", "generated")
            if isinstance(answer, dict) and all(isinstance(answer.get(key), str) for key in texts):
                answers.append(answer)
        return answers, not file.readline()


def _similarity(answer: str, expected: str) -> float:
    one, other = normalise(answer)[:COMPARED], normalise(expected)[:COMPARED]
    return 1 - levenshtein(one, other) / max(len(one), len(other), 1)


def _card(run: Path, answer: dict[str, Any]) -> dict[str, Any]:
    texts = [answer["question"], answer["expected"], answer["generated"]]
    references = answer.get("references")
    size = references.get("size") if isinstance(references, dict) else None
    return {
        "question": answer["question"],
        "expected": answer["expected"],
        "answer": answer["generated"],
        "category": str(answer.get("category") or ""),
        "thumbnail": thumbnail(
            media_named(run, answer.get("image")),
            regions_drawn(size, answer["expected"], [answer["generated"]]),
        ),
        "long": is_long(texts),
    }


def media_named(run: Path, name: Any) -> Media | None:
    """The image of a name in a run's files: a path, or a part of a file; None for no name."""
    if not name:
        return None
    match = SLICE.fullmatch(str(name))
    if match is not None and (run / match[1]).is_file():
        start, end = int(match[2]), int(match[3])
        return Media(Slice(run / match[1], start, max(end - start, 0)))
    return Media(run / str(name))
