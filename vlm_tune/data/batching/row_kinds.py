"""Kinds of rows: a micro-batch has rows of one kind, and an optimizer step has those of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlm_tune.config.data import Source
from vlm_tune.data.prepare.job import task_names


class RowKind(NamedTuple):
    """The properties that all rows of a micro-batch have in common.

    Attributes:
        task: The task whose adapters they train; None where all tasks have the same.
        loss_weight: The factor of their losses.
        objective: The objective of a mixture that they train; None where they train all.
    """

    task: str | None = None
    loss_weight: float = 1.0
    objective: str | None = None


def row_kinds(sources: Sequence[Source], *, by_task: bool) -> list[RowKind]:
    """The kind of each source's rows; with `by_task` tasks are kept apart."""
    return [
        RowKind(task if by_task else None, source.loss_weight or 1.0, source.objective)
        for source, task in zip(sources, task_names(sources), strict=True)
    ]


def numbered(kinds: Sequence[RowKind]) -> np.ndarray:
    """int64[sources]: the number of each source's kind, in order of first use."""
    distinct = list(dict.fromkeys(kinds))
    return np.array([distinct.index(kind) for kind in kinds], dtype=np.int64)


def split_by_kind(rows: np.ndarray, kinds: np.ndarray) -> list[np.ndarray]:
    """The rows of each kind, in their order; `kinds` has the kind of every row of the epoch."""
    if len(kinds) == 0 or kinds.min() == kinds.max():
        return [rows]
    of_rows = kinds[rows]
    return [rows[of_rows == kind] for kind in np.unique(of_rows)]
