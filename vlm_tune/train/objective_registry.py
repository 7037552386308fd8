"""The objective of a recipe's stage, with the reference model that it compares with."""

from __future__ import annotations

import torch

from vlm_tune.config.objectives import AnyObjective, Contrastive, Kto, LanguageModeling
from vlm_tune.train.objectives import ContrastiveObjective, LanguageModelingObjective, Objective
from vlm_tune.train.preferences import KtoObjective, PairObjective, Summed
from vlm_tune.train.references import ReferenceModel


def build_objective(
    config: AnyObjective, reference: ReferenceModel | None, summed: Summed, device: torch.device
) -> Objective:
    """The objective of a recipe.

    Args:
        config: The recipe's section.
        reference: The reference model; None for objectives without one.
        summed: Sums a tensor over all ranks.
        device: The device of the training.
    """
    if isinstance(config, LanguageModeling):
        return LanguageModelingObjective(config)
    if isinstance(config, Contrastive):
        return ContrastiveObjective(config)
    if isinstance(config, Kto):
        assert reference is not None
        return KtoObjective(config, reference, summed, device)
    return PairObjective(config, reference)
