"""The type of a metric: statistics of rows that add up, and a score of their sums.

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_tune.evaluation.intervals import Value
from vlm_tune.evaluation.metrics import Answer


def mean(totals: np.ndarray) -> np.ndarray:
    """The mean of the statistics (score, 1)."""
    return totals[..., 0] / totals[..., 1]


def any_answer(answer: Answer) -> bool:
    """True: the rule of metrics that any row can be scored by."""
    return True


@dataclass(frozen=True)
class Metric:
    """A way to score answers.

    Attributes:
        name: its name in recipes and results.
        title: its name in tables.
        statistics: of rows [N]: an array [N, S] or a sparse matrix.
        value: the score of summed statistics.
        applies: whether a row can be scored by it.
        needs: what such a row has, in words.
        top: the largest score; None where there is none.
        log: whether the score is positive and multiplicative.
        lower_is_better: whether less is better.
    """

    name: str
    title: str
    statistics: Callable[[Sequence[Answer]], Any]
    value: Value = mean
    applies: Callable[[Answer], bool] = any_answer
    needs: str = "an answer"
    top: float | None = 1.0
    log: bool = False
    lower_is_better: bool = False


def by_row(score: Callable[[Answer], float]) -> Callable[[Sequence[Answer]], np.ndarray]:
    """Statistics whose mean is the score."""
    return lambda answers: np.array(
        [[score(answer), 1.0] for answer in answers], dtype=np.float64
    ).reshape(-1, 2)
