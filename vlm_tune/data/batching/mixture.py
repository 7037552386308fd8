"""The share of each source in an epoch: by count, by weight, or by size and a temperature."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlm_tune.config.data import DataSection, Source


def epoch_counts(units: Sequence[int], sources: Sequence[Source], data: DataSection) -> list[int]:
    """The number of units of each source in an epoch.

    Args:
        units: The number of units that each source has.
        sources: The sources. One with neither count nor weight gives all of its units.
        data: The section with `epoch_size`, the units of all sources with weights together, divided
            exactly by weight (if None, as many as possible without drawing a unit twice), and with
            `mixture`, which gives weights by size to sources without a count.
    """
    epoch_size = data.epoch_size
    weights = np.array([source.weight or 0.0 for source in sources])
    if data.mixture is not None:
        powers = np.array(units, dtype=np.float64) ** (1 / data.mixture.temperature)
        weights = np.where([source.count is not None for source in sources], 0.0, powers)
    counts = [source.count or number for source, number in zip(sources, units, strict=True)]
    counts = [count if number else 0 for count, number in zip(counts, units, strict=True)]
    weighted = [place for place, number in enumerate(units) if weights[place] and number]
    if not weighted:
        return counts
    shares = weights[weighted] / weights[weighted].sum()
    most = min(units[place] / share for place, share in zip(weighted, shares, strict=True))
    # The quotient of a whole number may be rounded to just below it.
    size = epoch_size or int(most + 1e-6)
    exact = shares * size
    rounded = np.floor(exact).astype(int)
    for place in np.argsort(-(exact - rounded), kind="stable")[: size - int(rounded.sum())]:
        rounded[place] += 1
    for place, count in zip(weighted, rounded.tolist(), strict=True):
        counts[place] = count
    return counts
