"""Several objectives in one: the weighted sum of their mean losses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlm_tune.config.objectives import ObjectiveMixture, parts_of
from vlm_tune.data.batch import Batch
from vlm_tune.train.contrastive import ByRank
from vlm_tune.train.objectives import Counts, Loss, Metrics, Objective


class MixtureObjective:
    """The sum of objectives' losses, each a mean over its own items of a step, times its weight.

    Each micro-batch trains all of them, or the one that its source names. Beside their figures the
    mean loss of each is logged; all names begin with the objective's kind.
    """

    def __init__(
        self,
        config: ObjectiveMixture,
        objectives: Sequence[Objective],
        by_rank: ByRank,
        device: torch.device,
    ) -> None:
        """Takes the objectives of the recipe's list, and a function that gathers their counts."""
        self.config = config
        self.by_rank = by_rank
        self.device = device
        self._parts = [
            (part.kind, part.weight or 1.0, objective)
            for part, objective in zip(parts_of(config), objectives, strict=True)
        ]
        self.metrics: Sequence[str] = [
            f"{kind}/{name}"
            for kind, _, objective in self._parts
            for name in ("loss", *objective.metrics)
        ]
        self._totals: dict[str, Counts] = {}
        """The counts of the step by kind, over all of its micro-batches and ranks."""

    def counts(self, batch: Batch) -> Counts:
        """The number of items of all objectives together, each of which has its own besides."""
        return Counts(sum(part.counts(batch).items for _, _, part in self._trained_by(batch)))

    def before(self, model: Any, batches: Iterable[Batch], totals: Counts) -> None:
        """Learns the counts of each objective over the step, and has each prepare its own."""
        batches = list(batches)
        for kind, _, objective in self._parts:
            trained = [batch for batch in batches if batch.objective in (None, kind)]
            counts = sum(map(objective.counts, trained), Counts(0))
            items, tokens = self.by_rank(counts).sum(0).tolist()
            self._totals[kind] = Counts(max(items, 1), tokens)
            objective.before(model, trained, self._totals[kind])

    def __call__(self, model: Any, batch: Batch, totals: Counts | None = None) -> Loss:
        count = self.counts(batch)
        # The trainer divides all by the number of items of all objectives.
        divisor = (totals or count).items
        total = torch.zeros((), device=self.device)
        zero = total.detach()
        metrics: Metrics = dict.fromkeys(self.metrics, (zero, zero))
        for kind, weight, objective in self._trained_by(batch):
            of_kind = self._totals.get(kind) or objective.counts(batch)
            loss = objective(model, batch, of_kind)
            total = total + loss.sum * (weight * divisor / max(of_kind.items, 1))
            metrics[f"{kind}/loss"] = loss.sum.detach(), _scalar(loss.count, self.device)
            metrics |= {f"{kind}/{name}": figure for name, figure in loss.metrics.items()}
        return Loss(total, count.items, metrics=metrics)

    def _trained_by(self, batch: Batch) -> list[tuple[str, float, Objective]]:
        """The kind, weight and function of each objective that a batch trains."""
        return [part for part in self._parts if batch.objective in (None, part[0])]


def _scalar(number: int, device: torch.device) -> Tensor:
    return torch.full((), float(number), device=device)
