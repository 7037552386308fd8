"""The share of padding in batches, computed from lengths alone.

Rows one by one, the recipe's own batches and packed batches are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np

from vlm_tune.config.data import DataSection
from vlm_tune.config.recipe import Recipe
from vlm_tune.config.tune import task_rule
from vlm_tune.data.batching.sampler import Plan, Sizes
from vlm_tune.data.prepare.dataset import Prepared
from vlm_tune.data.prepare.worker import OK

MEASURED = 2000
"""Batches of an epoch that are measured; the others are similar."""


@dataclass(frozen=True)
class Waste:
    """The cost of one way to batch.

    `padding` is the share of the batches' input tokens that is padding. `tokens_per_question` is
    the number of input tokens, with padding, per question.
    """

    name: str
    padding: float
    tokens_per_question: float


def padding(prepared: Prepared, stage: Recipe, sizes: Sizes) -> list[Waste]:
    """Returns the waste of several ways to batch.

    These are rows one by one in random order, the recipe's own batches, and these with packing if
    the recipe does not pack.
    """
    by_task = task_rule(stage.tune) is not None
    data = stage.data

    def plan(data: DataSection) -> Plan:
        return Plan(prepared, data, sizes, stage.seed, by_task=by_task)

    wastes = [
        _one_by_one(prepared, sizes.batch_size, stage.seed),
        _planned("this recipe", prepared, plan(data)),
    ]
    if not data.packing:
        packed = plan(data.model_copy(update={"packing": True}))
        wastes.append(_planned("with packing", prepared, packed))
    return wastes


def _row_lengths(prepared: Prepared) -> np.ndarray:
    """Returns the lengths of examples, in tokens, before rows of one image were joined."""
    if prepared.layout == "seq2seq" or prepared.data.group == "none":
        return prepared.store.lengths.astype(np.int64)
    trained = (prepared.column("status") == OK) & (prepared.column("part") == 0)
    examples = np.maximum(prepared.column("examples")[trained], 1)
    return np.repeat(prepared.column("tokens")[trained] // examples, examples).astype(np.int64)


def _one_by_one(prepared: Prepared, batch: int, seed: int) -> Waste:
    lengths = np.random.default_rng(seed).permutation(_row_lengths(prepared))
    starts = np.arange(0, len(lengths), batch)
    padded = np.maximum.reduceat(lengths, starts) * np.diff(starts, append=len(lengths))
    return Waste(
        "rows one by one", 1 - lengths.sum() / padded.sum(), padded.sum() / prepared.questions
    )


def _planned(name: str, prepared: Prepared, plan: Plan) -> Waste:
    """Measures the first batches of the first epoch of a plan."""
    lengths = prepared.store.lengths
    questions = prepared.store.questions
    starts = prepared.starts
    epoch = plan.epoch(0)
    sizes = plan.sizes
    real = padded = question_count = 0
    for step, number in islice(epoch.places(sizes.ranks), MEASURED):
        rows: list[int] = []
        for units in epoch.rows(step, number, 0, sizes.ranks):
            examples = np.concatenate([np.arange(starts[unit], starts[unit + 1]) for unit in units])
            question_count += int(questions[examples].sum())
            # Several units form one packed row; the examples of a single unit are separate rows.
            rows += [int(lengths[examples].sum())] if len(units) > 1 else lengths[examples].tolist()
        real = real + sum(rows)
        padded = padded + max(rows, default=0) * len(rows)
    return Waste(name, 1 - real / padded, padded / question_count)
