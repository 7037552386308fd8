"""Answers as classes: what classification scores are computed from, and the confusion matrix.

The classes are the reference answers, compared as in exact match. An answer that is not one of
them is wrong and belongs to no class. A class that no reference of a group of rows names does not
count in that group's means, as in scikit-learn's balanced accuracy. Scores equal scikit-learn's
with `labels` set to these classes and `zero_division=0`.

Shapes: N rows, K classes. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vlm_tune.evaluation.texts import normalise

MOST_SHOWN = 40
"""Classes up to which a confusion matrix is made."""
LEAST_REPEATS = 2.0
"""Mean number of rows of a class from which answers count as classes by themselves."""


def class_statistics(pairs: Sequence[tuple[str, str]]) -> Any:
    """Right, predicted and true counts of each class: a sparse matrix [N, 3 K + 1].

    The last column is 1.

    Args:
        pairs: the answer and the reference of each row.
    """
    from scipy.sparse import csr_matrix

    expected = [normalise(reference) for _, reference in pairs]
    place = {name: number for number, name in enumerate(sorted(set(expected)))}
    count = len(place)
    rows: list[int] = []
    columns: list[int] = []
    for row, (answer, _) in enumerate(pairs):
        true = place[expected[row]]
        predicted = place.get(normalise(answer))
        marked = [2 * count + true, 3 * count]
        if predicted is not None:
            marked.append(count + predicted)
        if predicted == true:
            marked.append(true)
        rows += [row] * len(marked)
        columns += marked
    return csr_matrix((np.ones(len(rows)), (rows, columns)), (len(pairs), 3 * count + 1))


def _counts(totals: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right, predicted and true counts [..., K]."""
    right, predicted, true = np.split(totals[..., :-1], 3, axis=-1)
    return right, predicted, true


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, 0 where whole is 0."""
    return np.divide(part, whole, out=np.zeros_like(part, dtype=np.float64), where=whole > 0)


def precision(right: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """The share of answers of a class that are right."""
    return _ratio(right, predicted)


def recall(right: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """The share of a class's rows that are answered right."""
    return _ratio(right, true)


def f1(right: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """The harmonic mean of precision and recall."""
    return _ratio(2 * right, predicted + true)


Measure = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def macro(measure: Measure) -> Callable[[np.ndarray], np.ndarray]:
    """The mean of a measure over the classes that references name."""

    def value(totals: np.ndarray) -> np.ndarray:
        counts = _counts(totals)
        named = counts[2] > 0
        return _ratio((measure(*counts) * named).sum(-1), named.sum(-1).astype(np.float64))

    return value


def micro(measure: Measure) -> Callable[[np.ndarray], np.ndarray]:
    """A measure of the counts of all classes together."""
    return lambda totals: measure(*(counts.sum(-1) for counts in _counts(totals)))


def class_table(pairs: Sequence[tuple[str, str]]) -> dict[str, Any] | None:
    """The confusion matrix and the scores of each class; None where answers are no classes.

    They are where there are at most `MOST_SHOWN` and each comes at least `LEAST_REPEATS` times on
    average, two classes at least.

    Returns:
        `labels`; `matrix`, rows by true class and columns by answer, where the last column is an
        answer that is no class; `rows`, of each class its n, precision, recall and f1.
    """
    expected = [normalise(reference) for _, reference in pairs]
    labels = sorted(set(expected))
    if not 2 <= len(labels) <= MOST_SHOWN or len(pairs) < LEAST_REPEATS * len(labels):
        return None
    place = {name: number for number, name in enumerate(labels)}
    matrix = np.zeros((len(labels), len(labels) + 1), dtype=np.int64)
    for (answer, _), name in zip(pairs, expected, strict=True):
        matrix[place[name], place.get(normalise(answer), len(labels))] += 1
    counts = (np.diag(matrix[:, :-1]), matrix[:, :-1].sum(0), matrix.sum(1))
    measured = [measure(*counts).tolist() for measure in (precision, recall, f1)]
    return {
        "labels": labels,
        "matrix": matrix.tolist(),
        "rows": [
            dict(zip(("n", "precision", "recall", "f1"), row, strict=True))
            for row in zip(counts[2].tolist(), *measured, strict=True)
        ],
    }
