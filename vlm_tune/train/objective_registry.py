"""The objective of a recipe's stage, with the reference model that it compares with."""

from __future__ import annotations

import torch

from vlm_tune.config.grpo import Grpo
from vlm_tune.config.objectives import (
    AnyObjective,
    Contrastive,
    Kto,
    LanguageModeling,
    Matching,
    ObjectiveMixture,
    SpanCorruption,
    parts_of,
)
from vlm_tune.train.contrastive import ByRank, PairedObjective, ViewsObjective, single_rank
from vlm_tune.train.matching import MatchingObjective
from vlm_tune.train.mixture import MixtureObjective
from vlm_tune.train.objectives import (
    ContrastiveObjective,
    LanguageModelingObjective,
    Objective,
)
from vlm_tune.train.policy import GrpoObjective
from vlm_tune.train.preferences import KtoObjective, PairObjective, Summed
from vlm_tune.train.references import ReferenceModel


def build_objective(
    config: AnyObjective,
    reference: ReferenceModel | None,
    summed: Summed,
    device: torch.device,
    by_rank: ByRank = single_rank,
) -> Objective:
    """The objective of a recipe.

    Args:
        config: The recipe's section.
        reference: The reference model; None for objectives without one.
        summed: Sums a tensor over all ranks.
        device: The device of the training.
        by_rank: Gathers figures of all ranks.
    """
    if isinstance(config, ObjectiveMixture):
        parts = [build_objective(each, None, summed, device, by_rank) for each in parts_of(config)]
        return MixtureObjective(config, parts, by_rank, device)
    if isinstance(config, LanguageModeling | SpanCorruption):
        return LanguageModelingObjective(config)
    if isinstance(config, Contrastive):
        return _contrastive(config, by_rank)
    if isinstance(config, Matching):
        return MatchingObjective(config)
    if isinstance(config, Kto):
        assert reference is not None
        return KtoObjective(config, reference, summed, device)
    if isinstance(config, Grpo):
        return GrpoObjective(config, reference, summed, device)
    return PairObjective(config, reference)


def _contrastive(config: Contrastive, by_rank: ByRank) -> Objective:
    """The objective of images and captions, of two views of images, or of both."""
    if config.views == "image_image":
        return ViewsObjective(config, None, by_rank)
    learns = config.learns_scale
    text = PairedObjective(config, by_rank) if learns else ContrastiveObjective(config)
    return ViewsObjective(config, text, by_rank) if config.two_views else text
