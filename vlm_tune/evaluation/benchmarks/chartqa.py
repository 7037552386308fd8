"""ChartQA: questions about charts, by relaxed accuracy.

A copy is a folder as published: `test/test_human.json`, `test/test_augmented.json` and `test/png/`,
or such a folder's `test`. Source: Masry et al. 2022, https://github.com/vis-nlp/ChartQA.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    question_row,
    read_json,
)
from vlm_tune.evaluation.metric import Metric, by_row
from vlm_tune.evaluation.metrics import Answer
from vlm_tune.evaluation.texts import relaxed_match
from vlm_tune.quoting import quoted

HALVES = ("human", "augmented")


def read(folder: Path) -> list[Conversation]:
    """The rows of a copy's test part; its halves are sources. Raises `DataError`."""
    check_folder(folder, "test/test_human.json, test/test_augmented.json and test/png/")
    test = folder / "test" if (folder / "test").is_dir() else folder
    files = [(half, test / f"test_{half}.json") for half in HALVES]
    if not any(path.is_file() for _, path in files):
        raise DataError("has no test_human.json and no test_augmented.json", source=str(test))
    return [row for half, path in files if path.is_file() for row in _half(test, half, path)]


def _half(test: Path, half: str, path: Path) -> list[Conversation]:
    entries = read_json(path)
    if not isinstance(entries, list):
        raise DataError(f"expected a list of questions, got {quoted(entries)}", source=str(path))
    rows = []
    for number, entry in enumerate(entries, 1):
        question = str(field(entry, ["query", "question"], path, number)).strip()
        rows.append(
            question_row(
                find_image(test, str(field(entry, ["imgname"], path, number)), ("png", "")),
                f"{question}\n{SHORT}",
                str(field(entry, ["label", "answer"], path, number)).strip(),
                row_id=f"{half}:{number}",
                source=path,
                row=number,
                part=half,
                references=References("chartqa"),
            )
        )
    return rows


def _right(answer: Answer) -> float:
    return float(relaxed_match(answer.generated, answer.expected))


def _by_half(answers: Sequence[Answer]) -> np.ndarray:
    """Statistics (right, 1) in the columns of the answer's half, and zeros in the others."""
    statistics = np.zeros((len(answers), 4))
    for row, answer in enumerate(answers):
        column = 2 * HALVES.index(answer.source)
        statistics[row, column : column + 2] = _right(answer), 1
    return statistics


def _average(totals: np.ndarray) -> np.ndarray:
    """The mean of the halves' accuracies, of those that have rows."""
    counts = totals[..., 1::2]
    accuracies = totals[..., ::2] / np.maximum(counts, 1)
    return accuracies.sum(-1) / (counts > 0).sum(-1)


CHARTQA = Benchmark(
    "chartqa",
    read,
    (
        Metric(
            "chartqa_average",
            "ChartQA relaxed accuracy (mean of halves)",
            _by_half,
            _average,
            applies=of_form("chartqa"),
            needs="the form of ChartQA's rows",
        ),
        Metric(
            "chartqa_pooled",
            "ChartQA relaxed accuracy (all rows)",
            by_row(_right),
            applies=of_form("chartqa"),
            needs="the form of ChartQA's rows",
        ),
    ),
)
