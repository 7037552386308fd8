"""The loss of sampled completions and what they are worth, as TRL's `GRPOTrainer` (1.16) has them.

Shapes: N completions in groups of G, F reward functions; C completions that train, with S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_tune.config.grpo import Grpo

LEAST_DEVIATION = 1e-4
"""What TRL adds to a standard deviation before it divides by it."""


def summed_rewards(rewards: Tensor, weights: Tensor) -> Tensor:
    """The weighted sums [N] of rewards [N, F]; NaN where no function gave one."""
    total = (rewards * weights).nansum(1)
    return total.masked_fill(rewards.isnan().all(1), torch.nan)


def deviation(values: Tensor) -> Tensor:
    """The unbiased standard deviation of each row of values [..., n], NaN left out."""
    squares = (values - values.nanmean(-1, keepdim=True)) ** 2
    count = (~values.isnan()).sum(-1)
    return (squares.nansum(-1) / (count - 1)).sqrt()


def advantages_of(groups: Tensor, scale: Tensor | None) -> Tensor:
    """How much better completions are than their group: [N] of summed rewards [N / G, G].

    Those that no function rewards have 0.

    Args:
        groups: The summed rewards.
        scale: Standard deviations that broadcast to the groups; None to divide by none.
    """
    advantages = groups - groups.nanmean(1, keepdim=True)
    if scale is not None:
        advantages = advantages / (scale + LEAST_DEVIATION)
    return advantages.nan_to_num(nan=0.0).flatten()


@dataclass(frozen=True)
class PolicyLoss:
    """Losses of tokens, and the figures that are logged.

    Attributes:
        tokens: The loss [S] of each token, weighted for the sum.
        divergence: The estimated divergence [S] from the reference model; None without one.
        low: bool[S], or [C] with a ratio per completion: clipped from below.
        high: As `low`, from above.
    """

    tokens: Tensor
    divergence: Tensor | None
    low: Tensor
    high: Tensor


def policy_loss(
    config: Grpo,
    logprobs: Tensor,
    before: Tensor,
    reference: Tensor | None,
    advantages: Tensor,
    members: Tensor,
    lengths: Tensor,
) -> PolicyLoss:
    """The clipped loss of sampled tokens.

    Args:
        config: The recipe's section.
        logprobs: Log-probabilities [S] of the tokens.
        before: Those before the step's first update.
        reference: Those under the reference model, if there is one.
        advantages: What each completion is worth, [C].
        members: int64[S], the completion that each token is of.
        lengths: int64[C], numbers of tokens.
    """
    log_ratios = logprobs - before
    worth = advantages[members]
    whole = config.importance_sampling_level == "sequence"
    if whole:
        sums = log_ratios.new_zeros(len(lengths)).index_add(0, members, log_ratios)
        log_ratios = sums / lengths.clamp(min=1)
        worth = advantages
    ratios = log_ratios.exp()
    low, high = config.clip
    losses = -torch.min(ratios * worth, ratios.clamp(low, high) * worth)
    losses = losses[members] if whole else losses
    divergence = None
    if reference is not None:
        log_ratio = reference - logprobs
        divergence = log_ratio.exp() - log_ratio - 1
        if config.use_bias_correction_kl:
            divergence = divergence * (ratios[members] if whole else ratios)
        losses = losses + config.beta * divergence
    if config.loss_type == "grpo":
        losses = losses / lengths[members]
    elif config.loss_type == "dr_grpo":
        losses = losses / config.max_completion_length
    return PolicyLoss(
        losses,
        None if divergence is None else divergence.detach(),
        (ratios < low) & (worth < 0),
        (ratios > high) & (worth > 0),
    )
