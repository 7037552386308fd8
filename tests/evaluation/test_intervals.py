"""Intervals cover the truth as often as they say; paired tests are exact where they can be."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.intervals import Setting, bootstrap_coverage, coverage, difference_coverage
from vlm_tune.evaluation.intervals import (
    cluster_numbers,
    cluster_sums,
    difference,
    interval,
    jackknife_variance,
    left_out,
)
from vlm_tune.evaluation.metric import mean


@pytest.mark.parametrize(
    "setting",
    [Setting(images, accuracy, 0.3) for images in (50, 500) for accuracy in (0.6, 0.97)],
    ids=str,
)
def test_intervals_cover_95_percent_of_drawn_evaluations(setting: Setting) -> None:
    """600 draws have a standard error of 0.9%; `python -m benchmarks.intervals` draws more."""
    assert 0.93 <= coverage(setting, 600) <= 0.975


def test_a_percentile_bootstrap_covers_too_rarely() -> None:
    assert bootstrap_coverage(Setting(50, 0.97, 0.3), 100) < 0.92


def test_intervals_of_differences_cover_too() -> None:
    assert difference_coverage(Setting(50, 0.97, 0.3), 0.02, 60) >= 0.9


def test_rows_that_share_an_image_are_one_cluster() -> None:
    numbers = cluster_numbers([["a"], ["b"], [], ["a", "c"], ["c"], ["b"], []])
    assert len(set(numbers.tolist())) == 4
    assert numbers[0] == numbers[3] == numbers[4] and numbers[1] == numbers[5]
    assert numbers[2] != numbers[6]


def test_the_variance_is_that_of_a_mean() -> None:
    scores = np.random.default_rng(0).uniform(size=40)
    sums = np.column_stack([scores, np.ones(40)])
    assert jackknife_variance(left_out(sums, mean)) == pytest.approx(scores.var(ddof=1) / 40)


def test_repeated_rows_of_an_image_tell_no_more_than_one() -> None:
    right = np.tile([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]], (10, 1))
    alone = interval(right, mean)
    repeated = interval(cluster_sums(np.repeat(right, 8, 0), np.repeat(np.arange(30), 8)), mean)
    assert alone is not None and repeated == pytest.approx(alone)


@pytest.mark.parametrize("images", [2, 20, *range(380, 400), 1000])
def test_an_interval_where_all_is_right_is_not_empty(images: int) -> None:
    ends = interval(np.ones((images, 2)), mean)
    assert ends is not None and 0 < ends[0] < 1 and ends[1] == 1


def test_one_image_has_no_interval() -> None:
    sums = np.array([[3.0, 5.0]])
    assert interval(sums, mean) is None
    gap = difference(sums, np.array([[1.0, 5.0]]), mean)
    assert (gap.value, gap.low, gap.high) == (pytest.approx(0.4), None, None)


def test_few_images_are_swapped_in_every_way() -> None:
    """Three images that all favour one model: two of the eight swaps are as extreme."""
    better = np.array([[3.0, 3.0], [2.0, 3.0], [3.0, 3.0]])
    worse = np.array([[1.0, 3.0], [1.0, 3.0], [2.0, 3.0]])
    assert difference(better, worse, mean).p == pytest.approx(2 / 8)
    assert difference(better, better, mean).p == 1.0


def test_the_paired_test_finds_what_is_there() -> None:
    generator = np.random.default_rng(1)
    ones = np.ones(200)
    low, high = (generator.random(200) < share for share in (0.4, 0.7))
    gap = difference(np.column_stack([high, ones]), np.column_stack([low, ones]), mean)
    assert gap.p is not None and gap.p < 0.01 and gap.low is not None and gap.low > 0
    shuffled = np.column_stack([generator.permutation(low), ones])
    same = difference(np.column_stack([low, ones]), shuffled, mean)
    assert same.p is not None and same.p > 0.2
