"""POPE: is an object in the image? Source: Li et al. 2023, https://github.com/AoiDragon/POPE.

A copy is a folder with `coco_pope_random.json`, `coco_pope_popular.json` or
`coco_pope_adversarial.json` (JSON lines) and COCO's validation images of 2014.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from vlm_tune.data.types import Conversation, References
from vlm_tune.errors import DataError
from vlm_tune.evaluation.benchmarks.rows import (
    SHORT,
    Benchmark,
    check_folder,
    field,
    find_image,
    of_form,
    parse_json,
    question_row,
    read_text,
)
from vlm_tune.evaluation.intervals import Value
from vlm_tune.evaluation.metric import Metric
from vlm_tune.evaluation.metrics import Answer
from vlm_tune.quoting import quoted

FILE = re.compile(r"coco_pope_(\w+)\.jsonl?")
PLACES = ("val2014", "images", "coco/val2014", "")
NEGATIVE = {"No", "not", "no"}
CHOICES = ("yes", "no")


def read(folder: Path) -> list[Conversation]:
    """The rows of a copy; the splits are its sources. Raises `DataError` for what can't be used."""
    check_folder(
        folder, "coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json"
    )
    matches = [(path, FILE.fullmatch(path.name)) for path in sorted(folder.iterdir())]
    files = [(path, match[1]) for path, match in matches if match]
    if not files:
        raise DataError("has no coco_pope_<split>.json", source=str(folder))
    return [row for path, split in files for row in _split(folder, path, split)]


def _split(folder: Path, path: Path, split: str) -> list[Conversation]:
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        entry = parse_json(line, path, number)
        label = str(field(entry, ["label"], path, number)).strip().lower()
        if label not in CHOICES:
            message = f"`label` must be yes or no, got {quoted(label)}"
            raise DataError(message, source=str(path), row=number)
        question = str(field(entry, ["text", "question"], path, number)).strip()
        rows.append(
            question_row(
                find_image(folder, str(field(entry, ["image"], path, number)), PLACES),
                f"{question}\n{SHORT}",
                label,
                row_id=str(entry.get("question_id", number)),
                source=path,
                row=number,
                part=split,
                references=References("pope", (), CHOICES, CHOICES.index(label)),
            )
        )
    return rows


def says_yes(text: str) -> bool:
    """Whether an answer counts as yes: its first sentence has none of the words no, No and not."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return NEGATIVE.isdisjoint(words)


def _counts(answers: Sequence[Answer]) -> np.ndarray:
    """The statistics (true positive, false positive, true negative, false negative) of answers."""
    answered = np.array([says_yes(answer.generated) for answer in answers])
    right = np.array([answer.expected == "yes" for answer in answers])
    columns = [answered & right, answered & ~right, ~answered & ~right, ~answered & right]
    return np.column_stack(columns).astype(np.float64)


def _ratio(above: Callable[[np.ndarray], np.ndarray], below: list[float]) -> Value:
    """A weighted sum of the counts over another; 0 where the latter is 0."""

    def value(totals: np.ndarray) -> np.ndarray:
        divisor = totals @ np.array(below)
        return np.where(divisor > 0, above(totals) / np.maximum(divisor, 1e-300), 0.0)

    return value


def _metric(name: str, title: str, above: list[float], below: list[float]) -> Metric:
    weights = np.array(above)
    return Metric(
        f"pope_{name}",
        f"POPE {title}",
        _counts,
        _ratio(lambda totals: totals @ weights, below),
        applies=of_form("pope"),
        needs="the form of POPE's rows",
    )


POPE = Benchmark(
    "pope",
    read,
    (
        _metric("accuracy", "accuracy", [1, 0, 1, 0], [1, 1, 1, 1]),
        _metric("precision", "precision of yes", [1, 0, 0, 0], [1, 1, 0, 0]),
        _metric("recall", "recall of yes", [1, 0, 0, 0], [1, 0, 0, 1]),
        _metric("f1", "F1 of yes", [2, 0, 0, 0], [2, 1, 0, 1]),
        _metric("yes_ratio", "share of yes", [1, 1, 0, 0], [1, 1, 1, 1]),
    ),
)
