"""Objectives of preferences: chosen answers become likelier than rejected ones.

Shapes: P prompts whose answers are judged; A answers, P times the kinds of answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlm_tune.config.objectives import Dpo, Kto, Orpo, SimPo
from vlm_tune.data.batch import Batch
from vlm_tune.data.types import ANSWER_KINDS, CHOSEN, MISMATCHED, REJECTED
from vlm_tune.train.objectives import Counts, Loss, Metrics
from vlm_tune.train.preference_losses import dpo_losses, kto_losses, orpo_losses, simpo_losses
from vlm_tune.train.references import ReferenceModel

Summed = Callable[[Tensor], Tensor]
"""A function of a tensor: its sum over all ranks."""

REWARDS = ("rewards/chosen", "rewards/rejected")
FIGURES = (*REWARDS, "rewards/accuracies", "logps/chosen", "logps/rejected")
"""The means that an objective of pairs logs, by TRL's names, besides the margin of rewards."""


class PairObjective:
    """A loss of pairs of answers to one prompt; it adds over pairs.

    With a weight of their own, the cross-entropy of the chosen answers' tokens is added.
    """

    metrics: Sequence[str] = FIGURES

    def __init__(self, config: Dpo | SimPo | Orpo, reference: ReferenceModel | None) -> None:
        """Takes the reference model, which only DPO has."""
        self.config = config
        self.reference = reference
        if isinstance(config, Dpo):
            self.of_tokens = sum(weight for name, weight in config.losses if name == "sft")
        else:
            self.of_tokens = config.cpo_alpha if isinstance(config, SimPo) else 1.0

    def counts(self, batch: Batch) -> Counts:
        """The number of pairs, and of tokens of chosen answers."""
        lengths = _by_prompt(batch.on_host.answer_lengths)
        return Counts(len(lengths), int(lengths[:, CHOSEN].sum()))

    def before(self, model: Any, batches: Iterable[Batch], totals: Counts) -> None:
        """Computes nothing: the loss adds over pairs."""

    def __call__(self, model: Any, batch: Batch, totals: Counts | None = None) -> Loss:
        counts = self.counts(batch)
        totals = totals or counts
        reference = self.reference
        compared = None if reference is None else _by_prompt(reference(model, batch))[:, :2]
        policy = _by_prompt(model(batch, by_answer=True).sums)[:, :2]
        lengths = _by_prompt(batch.answer_lengths)[:, :2]
        losses, scores = self._losses(policy, compared, lengths)
        total = losses.sum()
        if self.of_tokens:
            # The trainer divides all by the number of pairs.
            share = self.of_tokens * max(totals.items, 1) / max(totals.tokens, 1)
            total = total - share * policy[:, CHOSEN].sum()
        rewards = self.config.beta * scores.detach()
        logps = policy.detach() if compared is not None else scores.detach()
        return Loss(total, counts.items, metrics=_pair_metrics(rewards, logps))

    def _losses(
        self, policy: Tensor, compared: Tensor | None, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss [P] of each pair, and scores [P, 2] that times beta are the rewards."""
        config = self.config
        if isinstance(config, Dpo):
            assert compared is not None
            return dpo_losses(config, policy, compared, lengths), policy - compared
        scores = policy / lengths.clamp(min=1)
        if isinstance(config, Orpo):
            return orpo_losses(policy, lengths, beta=config.beta), scores
        losses = simpo_losses(
            policy,
            lengths,
            beta=config.beta,
            gamma=config.simpo_gamma,
            smoothing=config.label_smoothing,
        )
        return losses, scores


class KtoObjective:
    """KTO's loss of single answers.

    Each is compared with the mean divergence of the step's mismatched answers, which is computed
    first, over all micro-batches and ranks.
    """

    def __init__(
        self, config: Kto, reference: ReferenceModel, summed: Summed, device: torch.device
    ) -> None:
        self.device = device
        self.config = config
        self.reference = reference
        self.summed = summed
        self.metrics: Sequence[str] = (*FIGURES, *(["kl"] * self.config.mismatches))
        self.kl = torch.zeros((), device=device)

    def counts(self, batch: Batch) -> Counts:
        """The number of answers."""
        lengths = _by_prompt(batch.on_host.answer_lengths)[:, :2]
        return Counts(int((lengths > 0).sum()))

    def before(self, model: Any, batches: Iterable[Batch], totals: Counts) -> None:
        """Computes the mean log-ratio of mismatched answers over the step, at least 0."""
        if not self.config.mismatches:
            return
        sums: list[Tensor] = []
        for batch in batches:
            with torch.no_grad():
                batch.reference = self.reference(model, batch)
                ratios = _by_prompt(model(batch, by_answer=True).sums - batch.reference)
            present = (_by_prompt(batch.answer_lengths) > 0)[:, MISMATCHED]
            sums.append(torch.stack([(ratios[:, MISMATCHED] * present).sum(), present.sum()]))
        # In an evaluation a process may have no rows.
        summed = torch.stack(sums).sum(0) if sums else torch.zeros(2, device=self.device)
        total, number = self.summed(summed).unbind()
        self.kl = (total / number.clamp(min=1)).clamp(min=0)

    def __call__(self, model: Any, batch: Batch, totals: Counts | None = None) -> Loss:
        config = self.config
        reference = self.reference(model, batch) if batch.reference is None else batch.reference
        policy = _by_prompt(model(batch, by_answer=True).sums)
        ratios = policy - _by_prompt(reference)
        present = _by_prompt(batch.answer_lengths) > 0
        weights = (config.desirable_weight, config.undesirable_weight)
        loss = policy.sum() * 0.0
        metrics: Metrics = {}
        hits = present.new_zeros((), dtype=torch.int64)
        for kind, name in ((CHOSEN, "chosen"), (REJECTED, "rejected")):
            of_kind = present[:, kind]
            losses = kto_losses(
                ratios[:, kind], self.kl, beta=config.beta, desirable=kind == CHOSEN
            )
            loss = loss + weights[kind] * (losses * of_kind).sum()
            number = of_kind.sum()
            rewards = config.beta * ratios[:, kind].detach() * of_kind
            metrics[f"rewards/{name}"] = rewards.sum(), number
            metrics[f"logps/{name}"] = (policy[:, kind].detach() * of_kind).sum(), number
            right = rewards > 0 if kind == CHOSEN else rewards < 0
            hits = hits + (right & of_kind).sum()
        counts = self.counts(batch)
        number = policy.detach().new_full((), float(counts.items))
        metrics["rewards/accuracies"] = hits, number
        if self.config.mismatches:
            metrics["kl"] = self.kl * number, number
        return Loss(loss, counts.items, metrics=metrics)


def _by_prompt(of_answers: Tensor | None) -> Tensor:
    """Figures of answers, [A], by prompt and kind: [P, kinds]."""
    if of_answers is None:
        return torch.zeros(0, ANSWER_KINDS)
    return of_answers.view(-1, ANSWER_KINDS)


def _pair_metrics(rewards: Tensor, logps: Tensor) -> Metrics:
    """The figures of pairs, from rewards and log-probabilities [P, 2]."""
    number = rewards.new_full((), float(len(rewards)))
    sums = (*rewards.sum(0), (rewards[:, 0] > rewards[:, 1]).sum(), *logps.sum(0))
    return {name: (total, number) for name, total in zip(FIGURES, sums, strict=True)}
