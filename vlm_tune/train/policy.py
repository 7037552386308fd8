"""The objective of sampled completions: those that are rewarded become likelier.

Shapes: as in `policy_losses`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlm_tune.config.grpo import Grpo
from vlm_tune.data.batch import Batch, Completions
from vlm_tune.data.types import ANSWER_KINDS, CHOSEN
from vlm_tune.train.objectives import Counts, Loss, Metrics
from vlm_tune.train.policy_losses import (
    PolicyLoss,
    advantages_of,
    deviation,
    policy_loss,
    summed_rewards,
)
from vlm_tune.train.references import ReferenceModel
from vlm_tune.transfer import to_device


class GrpoObjective:
    """The clipped loss of completions whose rewards are compared within their group.

    It adds over completions, or over tokens, as `loss_type` says.
    """

    def __init__(
        self,
        config: Grpo,
        reference: ReferenceModel | None,
        summed: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> None:
        """Takes the reference model, which there is with `beta`, and a sum over all ranks."""
        self.config = config
        self.reference = reference
        self.summed = summed
        self.device = device
        self.weights = torch.tensor(config.weights)
        self.deviation = torch.zeros(())
        self.metrics: Sequence[str] = (
            "reward",
            "reward_std",
            "frac_reward_zero_std",
            *(f"rewards/{name}/mean" for name in config.names),
            "completions/mean_length",
            "completions/mean_terminated_length",
            "completions/clipped_ratio",
            *(["kl"] if reference is not None else []),
            "clip_ratio/low_mean",
            "clip_ratio/high_mean",
            "clip_ratio/region_mean",
        )

    def counts(self, batch: Batch) -> Counts:
        """The number of completions, or of tokens, that the loss is a mean of."""
        by_token = self.config.loss_type in ("bnpo", "dapo")
        return Counts(batch.supervised if by_token else len(_completions(batch).lengths))

    def before(self, model: Any, batches: Iterable[Batch], totals: Counts) -> None:
        """Computes advantages, for which the step's rewards may be needed, and the reference's
        log-probabilities.
        """
        batches = list(batches)
        rewards = [self._rewards(batch) for batch in batches]
        self.deviation = self._deviation(torch.cat(rewards) if rewards else torch.zeros(0))
        for batch, of_batch in zip(batches, rewards, strict=True):
            completions = _completions(batch)
            groups = of_batch.view(-1, self.config.num_generations)
            scale = {"group": deviation(groups)[:, None], "batch": self.deviation, "none": None}
            advantages = advantages_of(groups, scale[self.config.scale_rewards])
            completions.advantages = to_device(advantages[completions.trained], self.device)
            if self.reference is not None and completions.reference is None:
                temperature = self.config.temperature
                completions.reference = self.reference(model, batch, temperature)

    def __call__(self, model: Any, batch: Batch, totals: Counts | None = None) -> Loss:
        completions = _completions(batch)
        assert completions.advantages is not None
        logprobs: Tensor = model(batch, temperature=self.config.temperature).logprobs
        if completions.logprobs is None:
            completions.logprobs = logprobs.detach()
        # Without a completion that trains there are no tokens either.
        members = batch.targets if batch.answer_of is None else batch.answer_of // ANSWER_KINDS
        lengths = batch.targets
        if batch.answer_lengths is not None:
            lengths = batch.answer_lengths.view(-1, ANSWER_KINDS)[:, CHOSEN]
        loss = policy_loss(
            self.config,
            logprobs,
            completions.logprobs,
            completions.reference,
            completions.advantages,
            members,
            lengths,
        )
        metrics = {**self._reward_metrics(batch), **_loss_metrics(loss)}
        return Loss(loss.tokens.sum(), self.counts(batch).items, metrics=metrics)

    def _rewards(self, batch: Batch) -> Tensor:
        """The summed rewards fp32[N] of a batch's completions."""
        return summed_rewards(_completions(batch).rewards, self.weights)

    def _deviation(self, rewards: Tensor) -> Tensor:
        """The standard deviation of the step's summed rewards, over all ranks; of this rank's."""
        known = rewards[~rewards.isnan()].double()
        moments = torch.stack([torch.ones_like(known), known, known**2]).sum(1)
        number, total, squares = self.summed(moments.to(self.device)).cpu().unbind()
        variance = (squares - total**2 / number) / (number - 1)
        return variance.clamp(min=0).sqrt().float()

    def _reward_metrics(self, batch: Batch) -> Metrics:
        """The figures of rewards and lengths."""
        completions = _completions(batch)
        rewards = self._rewards(batch)
        groups = rewards.view(-1, self.config.num_generations)
        whole = self.config.scale_rewards == "batch"
        spread = self.deviation.expand(len(groups)) if whole else deviation(groups)
        flat = spread.isclose(torch.zeros_like(spread))
        lengths = completions.lengths
        metrics = {
            "reward": _mean(rewards),
            "reward_std": _mean(self.deviation.expand(len(rewards))),
            "frac_reward_zero_std": _mean(flat.float()),
            "completions/mean_length": _mean(lengths.float()),
            "completions/mean_terminated_length": _mean(lengths[completions.ended].float()),
            "completions/clipped_ratio": _mean((~completions.ended).float()),
        }
        for name, column in zip(self.config.names, completions.rewards.unbind(1), strict=True):
            metrics[f"rewards/{name}/mean"] = _mean(column)
        # One copy to the device, which the host does not wait for.
        figures = torch.stack([figure.float() for pair in metrics.values() for figure in pair])
        pairs = to_device(figures, self.device).view(-1, 2)
        return {name: (pair[0], pair[1]) for name, pair in zip(metrics, pairs, strict=True)}


def _completions(batch: Batch) -> Completions:
    assert batch.completions is not None
    return batch.completions


def _loss_metrics(loss: PolicyLoss) -> Metrics:
    """The figures of the loss: its divergence, and shares of clipped ratios."""
    metrics = {
        "clip_ratio/low_mean": _mean(loss.low.float()),
        "clip_ratio/high_mean": _mean(loss.high.float()),
        "clip_ratio/region_mean": _mean((loss.low | loss.high).float()),
    }
    return metrics if loss.divergence is None else metrics | {"kl": _mean(loss.divergence)}


def _mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of values [n] and their number, NaN left out."""
    return values.nansum(), (~values.isnan()).sum()
