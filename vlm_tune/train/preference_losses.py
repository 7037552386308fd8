"""Losses of preferences, as TRL defines them, from log-probabilities of whole answers.

Shapes: P pairs; the columns of [P, 2] are the chosen and the rejected answer. TRL: `DPOTrainer`,
and the experimental `CPOTrainer` and `ORPOTrainer` (1.16).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlm_tune.config.objectives import Dpo, DpoLoss


def dpo_losses(config: Dpo, policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
    """The loss [P] of each pair, without that of `sft`.

    Args:
        config: The losses and their weights.
        policy: Summed log-probabilities [P, 2] under the model in training.
        reference: Those under the reference model.
        lengths: Numbers of tokens [P, 2].
    """
    ratios = policy - reference
    total = ratios.new_zeros(len(ratios))
    for name, weight in config.losses:
        if name != "sft":
            total = total + weight * _dpo_loss(name, config, ratios, lengths)
    return total


def _dpo_loss(name: DpoLoss, config: Dpo, ratios: Tensor, lengths: Tensor) -> Tensor:
    """The loss [P] of one type, from log-ratios [P, 2] of the model and its reference."""
    beta = config.beta
    chosen, rejected = ratios.unbind(1)
    margin = beta * (chosen - rejected)
    match name:
        case "sigmoid":
            return -logsigmoid(margin)
        case "hinge":
            return torch.relu(1 - margin)
        case "ipo":
            mean = ratios / lengths.clamp(min=1)
            return (mean[:, 0] - mean[:, 1] - 1 / (2 * beta)) ** 2
        case "sigmoid_norm":
            mean = ratios / lengths.clamp(min=1)
            return -logsigmoid(beta * (mean[:, 0] - mean[:, 1]))
        case "exo_pair":
            epsilon = config.label_smoothing
            return margin.sigmoid() * (logsigmoid(margin) - math.log1p(-epsilon)) + (
                -margin
            ).sigmoid() * (logsigmoid(-margin) - math.log(epsilon))
        case "robust":
            flipped = config.label_smoothing
            straight = -(1 - flipped) * logsigmoid(margin) + flipped * logsigmoid(-margin)
            return straight / (1 - 2 * flipped)
        case "nca_pair":
            both = logsigmoid(-beta * chosen) + logsigmoid(-beta * rejected)
            return -logsigmoid(beta * chosen) - 0.5 * both
        case "bco_pair":
            return -logsigmoid(beta * chosen) - logsigmoid(-beta * rejected)
        case "sppo_hard":
            return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
        case "apo_zero":
            return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)
        case "apo_down":
            return torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(margin)
    raise ValueError(name)


def simpo_losses(
    policy: Tensor, lengths: Tensor, *, beta: float, gamma: float, smoothing: float
) -> Tensor:
    """SimPO's loss [P] of each pair, from summed log-probabilities [P, 2] and numbers of tokens."""
    mean = policy / lengths.clamp(min=1)
    margin = beta * (mean[:, 0] - mean[:, 1]) - gamma
    return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)


def orpo_losses(policy: Tensor, lengths: Tensor, *, beta: float) -> Tensor:
    """ORPO's loss [P] of the odds ratio, without the cross-entropy of the chosen answers."""
    mean = policy / lengths.clamp(min=1)
    # log(1 - exp(x)) loses its digits by one way for small |x| and by the other for large.
    odds = mean - torch.where(
        mean > -math.log(2), (-torch.expm1(mean)).log(), torch.log1p(-mean.exp())
    )
    return -beta * logsigmoid(odds[:, 0] - odds[:, 1])


def kto_losses(ratios: Tensor, kl: Tensor, *, beta: float, desirable: bool) -> Tensor:
    """KTO's loss of answers that are all liked, or all disliked, from their log-ratios."""
    gain = ratios - kl if desirable else kl - ratios
    return 1 - torch.sigmoid(beta * gain)
