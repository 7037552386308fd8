"""How much of the batches is padding, computed from lengths alone: rows one by one, as the recipe batches, and packed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np

from vlm_tune.config.data import DataSection
from vlm_tune.data.batching.sampler import Plan, Sizes
from vlm_tune.data.prepare.dataset import Prepared
from vlm_tune.data.prepare.worker import OK

MEASURED = 2000
"""Batches of an epoch that are measured; the rest are alike."""


@dataclass(frozen=True)
class Waste:
    """One way to batch: the share of the batches' input tokens that is padding, and padded input tokens a question."""

    name: str
    padding: float
    tokens_per_question: float


def padding(prepared: Prepared, data: DataSection, sizes: Sizes, seed: int) -> list[Waste]:
    """The waste of rows one by one in random order, of the recipe's own batches, and of those with packing if it has none."""
    found = [
        _one_by_one(prepared, sizes.batch_size, seed),
        _planned("this recipe", prepared, data, sizes, seed),
    ]
    if not data.packing:
        found.append(
            _planned(
                "with packing", prepared, data.model_copy(update={"packing": True}), sizes, seed
            )
        )
    return found


def _row_lengths(prepared: Prepared) -> np.ndarray:
    """The lengths of examples before rows of one image were joined."""
    if prepared.layout == "seq2seq" or prepared.data.group == "none":
        return prepared.store.lengths.astype(np.int64)
    kept = (prepared.column("status") == OK) & (prepared.column("part") == 0)
    examples = np.maximum(prepared.column("examples")[kept], 1)
    return np.repeat(prepared.column("tokens")[kept] // examples, examples).astype(np.int64)


def _one_by_one(prepared: Prepared, batch: int, seed: int) -> Waste:
    lengths = np.random.default_rng(seed).permutation(_row_lengths(prepared))
    starts = np.arange(0, len(lengths), batch)
    padded = np.maximum.reduceat(lengths, starts) * np.diff(starts, append=len(lengths))
    return Waste(
        "rows one by one", 1 - lengths.sum() / padded.sum(), padded.sum() / prepared.questions
    )


def _planned(name: str, prepared: Prepared, data: DataSection, sizes: Sizes, seed: int) -> Waste:
    """Of the first batches of the first epoch."""
    lengths = prepared.store.lengths
    questions = prepared.store.questions
    starts = prepared.starts
    epoch = Plan(prepared, data, sizes, seed).epoch(0)
    real = padded = asked = 0
    for step, number in islice(epoch.places(sizes.ranks), MEASURED):
        rows: list[int] = []
        for units in epoch.rows(step, number, 0, sizes.ranks):
            own = np.concatenate([np.arange(starts[unit], starts[unit + 1]) for unit in units])
            asked += int(questions[own].sum())
            # Several units make one packed row; the examples of one unit are rows of their own.
            rows += [int(lengths[own].sum())] if len(units) > 1 else lengths[own].tolist()
        real = real + sum(rows)
        padded = padded + max(rows, default=0) * len(rows)
    return Waste(name, 1 - real / padded, padded / asked)
