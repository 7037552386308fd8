"""Completions of tiny prompts, as batches that the objective of rewards trains on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.helpers.tiny_models import batch_of
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.packing import completed, group_layout
from vlm_tune.data.prepare.run import conversations
from vlm_tune.data.types import Batch, Completions, Example
from vlm_tune.generation.chat import VisionLanguageModel

Ids = Sequence[int]


def prompts_of(model: VisionLanguageModel, recipe: Recipe, number: int) -> list[Example]:
    """The prompts of the recipe's first training rows."""
    rows = list(conversations(recipe.data, recipe.data.train, recipe.seed))[:number]
    return model.processor.prompts(rows)


def drawn_ids(groups: int, members: int, vocabulary: int, longest: int = 6) -> list[list[Ids]]:
    """Ids of completions of different lengths, by group."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, longest + 1, (groups, members), generator=generator).tolist()
    return [
        [torch.randint(5, vocabulary, (size,), generator=generator).tolist() for size in group]
        for group in lengths
    ]


def rewards_of(groups: int, members: int) -> torch.Tensor:
    """A reward [N, 1] of each completion."""
    generator = torch.Generator().manual_seed(4)
    return torch.rand(groups * members, 1, generator=generator)


def completions_batch(
    model: VisionLanguageModel,
    prompts: Sequence[Example],
    ids: Sequence[Sequence[Ids]],
    rewards: torch.Tensor,
) -> Batch:
    """Prompts with given completions, of which all train, as a batch."""
    layout = model.processor.spec.layout
    rows = [
        group_layout([completed(prompt, each, layout) for each in group], layout)
        for prompt, group in zip(prompts, ids, strict=True)
    ]
    batch = batch_of(model, rows)
    lengths = torch.tensor([len(each) for group in ids for each in group])
    all_of_them = torch.ones(len(lengths), dtype=torch.bool)
    batch.completions = Completions(rewards, lengths, all_of_them, all_of_them)
    return batch
