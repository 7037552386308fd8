"""95% confidence intervals of scores whose rows are clustered by image, and paired tests.

Rows about one image are not independent: they are resampled, or left out, together. Which interval
covers the true score in 95 of 100 evaluations was decided by simulation
(`python -m benchmarks.intervals`): a percentile bootstrap covers too rarely with 50 images.

Shapes: N rows, S statistics, C clusters, P permutations. This module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PRIOR = 0.1
"""The weight of full dependence in the variance of a share, in clusters; chosen by simulation."""
FREEDOM = 3
"""Degrees of freedom for each cluster but one in the interval of a share; chosen by simulation."""
PERMUTATIONS = 2000
MOST_EXACT = 10
"""Clusters up to which a paired test goes through all swaps."""
SWAPS = 4_000_000
"""Swaps, of all clusters in some permutations, that are in memory at a time."""
CHUNK = 256
"""Clusters or permutations whose statistics are dense at a time."""

Value = Callable[[np.ndarray], np.ndarray]
"""A function from summed statistics [..., S] to scores [...]."""


def cluster_numbers(images: Sequence[Sequence[Hashable]]) -> np.ndarray:
    """The number of each row's cluster, int64[N]: rows that share an image are in one.

    A row without images is a cluster by itself.

    Args:
        images: the images of each row.
    """
    parent: list[int] = list(range(len(images)))
    first: dict[Hashable, int] = {}

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    for row, shown in enumerate(images):
        for image in shown:
            parent[root(row)] = root(first.setdefault(image, row))
    roots = np.array([root(row) for row in range(len(images))], dtype=np.int64)
    return np.unique(roots, return_inverse=True)[1]


def cluster_sums(statistics: Any, clusters: np.ndarray) -> Any:
    """The summed statistics of each cluster [C, S], of an array [N, S] or a sparse matrix."""
    from scipy.sparse import csr_matrix

    rows = np.arange(len(clusters))
    member = csr_matrix((np.ones(len(clusters)), (clusters, rows)))
    return member @ statistics


def _dense(sums: Any) -> np.ndarray:
    return sums if isinstance(sums, np.ndarray) else sums.toarray()


def _totals(sums: Any) -> np.ndarray:
    return np.asarray(sums.sum(axis=0)).ravel()


def left_out(sums: Any, value: Value) -> np.ndarray:
    """The score without each cluster, float64[C]."""
    totals = _totals(sums)
    return np.concatenate(
        [
            value(totals - _dense(sums[start : start + CHUNK]))
            for start in range(0, sums.shape[0], CHUNK)
        ]
    )


def jackknife_variance(without: np.ndarray) -> float:
    """The variance of a score, from its values without each cluster; NaN under two clusters."""
    usable = without[np.isfinite(without)]
    count = len(usable)
    if count < 2:
        return math.nan
    return float((count - 1) / count * ((usable - usable.mean()) ** 2).sum())


def interval(
    sums: Any, value: Value, *, top: float | None = 1.0, log: bool = False
) -> tuple[float, float] | None:
    """The 95% interval of a score; None under two clusters.

    A score between 0 and `top` gets Wilson's interval, in which the number of rows is the number of
    independent rows that would have the jackknife's variance, and the quantile is Student's. It
    stays inside the range and is not empty where all answers are right. Other scores get a t
    interval, of their logarithm with `log`.

    Args:
        sums: the statistics of each cluster [C, S].
        value: the score of summed statistics.
        top: the largest score; None where there is none.
        log: whether the score is positive and multiplicative, as a perplexity.
    """
    score = float(value(_totals(sums)))
    if sums.shape[0] < 2 or not math.isfinite(score):
        return None
    return _ends(score, left_out(sums, value), top, log)


def _ends(
    score: float, without: np.ndarray, top: float | None, log: bool
) -> tuple[float, float] | None:
    """The interval of a score, from its values without each cluster."""
    clusters = len(without)
    if top is not None:
        variance = jackknife_variance(without / top)
        if math.isnan(variance):
            return None
        low, high = _wilson(min(max(score / top, 0.0), 1.0), variance, clusters)
        return top * low, top * high
    # The square root of NaN, under two usable clusters, is NaN.
    half = t_quantile(clusters - 1) * math.sqrt(
        jackknife_variance(np.log(without) if log else without)
    )
    if math.isnan(half):
        return None
    if not log:
        return score - half, score + half
    with np.errstate(over="ignore"):
        high = score * float(np.exp(half))
    return (score * math.exp(-half), high) if math.isfinite(high) else None


def _wilson(share: float, variance: float, clusters: int) -> tuple[float, float]:
    spread = share * (1 - share)
    # Near 0 and 1 few clusters vary, and their variance is too uncertain to be taken as it is: it
    # is averaged with that of fully dependent rows, which counts as `PRIOR` clusters of share 0.5.
    informative = 4 * clusters * spread
    dependent = spread / clusters
    smoothed = (PRIOR * dependent + informative * variance) / (PRIOR + informative)
    rows = spread / smoothed if smoothed > 0 else float(clusters)
    quantile = t_quantile(FREEDOM * (clusters - 1))
    square = quantile**2
    center = (share + square / (2 * rows)) / (1 + square / rows)
    half = quantile / (1 + square / rows) * math.sqrt(spread / rows + square / (4 * rows**2))
    # At 0 and 1 rounding would leave an end a little inside.
    low = 0.0 if share == 0 else max(center - half, 0.0)
    return low, 1.0 if share == 1 else min(center + half, 1.0)


def t_quantile(freedom: int) -> float:
    """The quantile of Student's t that an interval of 95% reaches to on each side."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))


# --- pairs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A score of one model less that of another on the same rows.

    Attributes:
        value: the difference; None, as all else, where a score is not finite.
        low, high: its 95% interval; None under two clusters.
        p: the two-sided p-value of a permutation test: the share of ways to swap the two models'
            answers, image by image, that give at least this difference.
    """

    value: float | None
    low: float | None
    high: float | None
    p: float | None


def difference(
    sums: Any,
    others: Any,
    value: Value,
    *,
    top: float | None = 1.0,
    log: bool = False,
    seed: int = 0,
) -> Difference:
    """Compares two models' scores on the same rows.

    The interval joins those of the two scores by their correlation (Zou 2007), so it is not empty
    where few rows differ.

    Args:
        sums: statistics of each cluster [C, S] of the first model.
        others: of the second.
        value, top, log: as in `interval`.
        seed: of the permutations, where there are too many to go through all.
    """
    score = float(value(_totals(sums)))
    other = float(value(_totals(others)))
    if not math.isfinite(score) or not math.isfinite(other):
        return Difference(None, None, None, None)
    p = _swapped(sums, others, value, score - other, seed)
    if sums.shape[0] < 2:
        return Difference(score - other, None, None, p)
    without = left_out(sums, value)
    other_without = left_out(others, value)
    if np.array_equal(without, other_without):
        return Difference(score - other, 0.0, 0.0, p)
    ends = _ends(score, without, top, log)
    other_ends = _ends(other, other_without, top, log)
    if ends is None or other_ends is None:
        return Difference(score - other, None, None, p)
    shared = 2 * _correlation(without, other_without)
    below, above = score - ends[0], ends[1] - score
    other_below, other_above = other - other_ends[0], other_ends[1] - other
    low = math.sqrt(max(below**2 + other_above**2 - shared * below * other_above, 0.0))
    high = math.sqrt(max(above**2 + other_below**2 - shared * above * other_below, 0.0))
    return Difference(score - other, score - other - low, score - other + high, p)


def _correlation(without: np.ndarray, other_without: np.ndarray) -> float:
    """The correlation of two scores, from their values without each cluster; 0 if one is fixed."""
    one = without - without.mean()
    other = other_without - other_without.mean()
    norms = math.sqrt(float((one**2).sum() * (other**2).sum()))
    return float((one * other).sum()) / norms if norms > 0 else 0.0


def _swapped(sums: Any, others: Any, value: Value, gap: float, seed: int) -> float:
    """The p-value of the permutation test."""
    clusters = sums.shape[0]
    totals = _totals(sums)
    other_totals = _totals(others)
    change = others - sums
    exact = clusters <= MOST_EXACT
    count = 2**clusters if exact else PERMUTATIONS
    generator = np.random.default_rng(seed)
    extreme = 0
    chunk = max(min(CHUNK, SWAPS // clusters), 1)
    for start in range(0, count, chunk):
        numbers = np.arange(start, min(start + chunk, count))
        swaps = (
            (numbers[:, None] >> np.arange(clusters)) & 1
            if exact
            else generator.integers(0, 2, (len(numbers), clusters))
        ).astype(np.float64)
        moved = np.asarray(swaps @ change)
        gaps = value(totals + moved) - value(other_totals - moved)
        extreme += int((np.abs(gaps) >= abs(gap) * (1 - 1e-9)).sum())
    # Of drawn permutations the one that was seen counts too, so that no p-value is 0.
    return extreme / count if exact else (extreme + 1) / (count + 1)
