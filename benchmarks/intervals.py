"""How often 95% intervals of accuracies cover the true one: python -m benchmarks.intervals

Draws evaluations of C images with 1 to 8 questions each, where the questions of an image are right
with a probability of its own (beta distributed), and counts how often the interval of the accuracy
holds the true accuracy, and that of the difference of two models the true difference. A percentile
bootstrap that draws images stands beside it. Takes a minute or two on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vlm_tune.evaluation.intervals import difference, interval
from vlm_tune.evaluation.metric import mean

MOST_QUESTIONS = 8
RESAMPLES = 1000


@dataclass(frozen=True)
class Setting:
    """What evaluations are drawn from.

    Attributes:
        images: how many images.
        accuracy: the true accuracy.
        correlation: of two questions of one image (the intraclass correlation).
    """

    images: int
    accuracy: float
    correlation: float


def evaluations(setting: Setting, count: int, seed: int) -> Iterator[np.ndarray]:
    """Right answers and questions of each image, float64[images, 2], of drawn evaluations."""
    generator = np.random.default_rng(seed)
    strength = (1 - setting.correlation) / setting.correlation
    for _ in range(count):
        questions = generator.integers(1, MOST_QUESTIONS + 1, setting.images)
        shares = generator.beta(
            setting.accuracy * strength, (1 - setting.accuracy) * strength, setting.images
        )
        right = generator.binomial(questions, shares)
        yield np.column_stack([right, questions]).astype(np.float64)


def pairs(
    setting: Setting, gap: float, count: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Evaluations of two models on the same questions; the second is worse by `gap`.

    Half of the images are as hard for both; of the others each model has its own.
    """
    generator = np.random.default_rng(seed)
    strength = (1 - setting.correlation) / setting.correlation
    other = setting.accuracy - gap
    for _ in range(count):
        questions = generator.integers(1, MOST_QUESTIONS + 1, setting.images)
        shares = [
            generator.beta(level * strength, (1 - level) * strength, setting.images)
            for level in (setting.accuracy, setting.accuracy, other)
        ]
        same = generator.random(setting.images) < 0.5
        # The second model's share on an image that is as hard for both, lowered to its accuracy.
        second = np.where(same, shares[0] * other / setting.accuracy, shares[2])
        yield tuple(  # type: ignore[misc]
            np.column_stack([generator.binomial(questions, share), questions]).astype(np.float64)
            for share in (shares[0], second)
        )


def coverage(setting: Setting, count: int, seed: int = 0) -> float:
    """The share of drawn evaluations whose interval holds the true accuracy."""
    ends = [interval(sums, mean) for sums in evaluations(setting, count, seed)]
    return _covered(ends, setting.accuracy)


def bootstrap_coverage(setting: Setting, count: int, seed: int = 0) -> float:
    """As `coverage`, for the percentile bootstrap."""
    generator = np.random.default_rng(seed)
    ends = []
    for sums in evaluations(setting, count, seed):
        drawn = sums[generator.integers(0, len(sums), (RESAMPLES, len(sums)))].sum(1)
        low, high = np.quantile(mean(drawn), [0.025, 0.975])
        ends.append((float(low), float(high)))
    return _covered(ends, setting.accuracy)


def difference_coverage(setting: Setting, gap: float, count: int, seed: int = 0) -> float:
    """The share of drawn pairs whose interval holds the true difference."""
    drawn = [difference(one, other, mean) for one, other in pairs(setting, gap, count, seed)]
    return _covered([(each.low, each.high) for each in drawn], gap)


def _covered(ends: list, truth: float) -> float:
    return sum(low <= truth <= high for low, high in ends) / len(ends)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="evaluations of each setting")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("images  accuracy  correlation  interval  percentile bootstrap  difference")
    for images in (20, 50, 500):
        for accuracy, gap in ((0.6, 0.05), (0.97, 0.02)):
            for correlation in (0.1, 0.3, 0.5):
                setting = Setting(images, accuracy, correlation)
                share = coverage(setting, options.count, options.seed)
                bootstrap = bootstrap_coverage(setting, options.count // 4, options.seed)
                paired = difference_coverage(setting, gap, options.count // 4, options.seed)
                print(
                    f"{images:6d}  {accuracy:8.0%}  {correlation:11.1f}  {share:8.1%}  "
                    f"{bootstrap:20.1%}  {paired:10.1%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
