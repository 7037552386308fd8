"""Completions of tiny prompts, as batches that the objective of rewards trains on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.preference_samples import LORA
from tests.helpers.tiny_models import batch_of, parsed, with_tune
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.batch import Batch, Completions
from vlm_tune.data.batching.loader import Position
from vlm_tune.data.batching.prompts import PromptFeed
from vlm_tune.data.batching.sampler import Plan, Sizes
from vlm_tune.data.packing import completed, group_layout
from vlm_tune.data.prepare.run import conversations, prepare
from vlm_tune.data.types import Example
from vlm_tune.events import StageReport
from vlm_tune.generation.answering import prompt_answers
from vlm_tune.generation.answers import Answer
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.train.sampling import Sampler, draw_seed

Ids = Sequence[int]


def policy_recipe(
    make: Callable[..., str], kind: str, *, tune: str = LORA, output: str = "run", **changes: Any
) -> Recipe:
    """A tiny recipe that samples four completions, of four tokens, of each prompt."""
    settings = {"kind": "grpo", "num_generations": 4, "max_completion_length": 4}
    changes["objective"] = settings | changes.pop("objective", {})
    common = {"train__log_every": 1, "evaluate__samples": 0, "data__test": []}
    return parsed(with_tune(make(kind, output=output), tune), **(common | changes))


def prompt_batches(model: VisionLanguageModel, recipe: Recipe) -> list[Batch]:
    """The batches of prompts of the recipe's first step."""
    train = prepare(recipe.data, recipe.data.train, model.processor, seed=recipe.seed)
    plan = Plan(train, recipe.data, Sizes.of(recipe.train), recipe.seed)
    fetch = model.processor.images.inputs
    feed = PromptFeed(train, plan, model.processor.spec, fetch, processor=model.processor)
    return next(feed.windows(Position()))


def drawn_answers(
    model: VisionLanguageModel, recipe: Recipe, batches: Sequence[Batch], group: int
) -> list[Answer]:
    """The answers that a sampler draws in the first step: `group` of 4 tokens for each prompt."""
    prompts = [prompt for batch in batches for unit in batch.prompts for prompt in unit]
    answers = prompt_answers(
        model,
        [prompt.example for prompt in prompts],
        Decoding(4, temperature=1.0, num_return_sequences=group, logprobs=True),
        fetch=model.processor.images.inputs,
        seeds=[draw_seed(recipe.seed, 1, prompt.row.id) for prompt in prompts],
    )
    return [each for first in answers for each in (first, *first.alternatives)]


def assert_equally_likely(
    trained: Sequence[tuple[tuple[int, ...], list[float]]], drawn: Sequence[Answer]
) -> None:
    """Asserts that training reads the completions that were drawn, ids and log-probabilities."""
    by_ids = sorted((answer.ids, list(answer.logprobs or ())) for answer in drawn)
    assert [ids for ids, _ in sorted(trained)] == [ids for ids, _ in by_ids]
    for (_, ours), (_, theirs) in zip(sorted(trained), by_ids, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def sampler_of(
    model: VisionLanguageModel, recipe: Recipe, report: StageReport = lambda event: None
) -> Sampler:
    """What samples completions, in one process without autocast."""
    engine: Any = SimpleNamespace(
        inference=nullcontext, accelerator=SimpleNamespace(autocast=nullcontext)
    )
    watch: Any = SimpleNamespace(at=lambda place, reached: None)
    return Sampler(model, recipe, engine, watch, report)


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


def low_share(completion_ids: list[list[int]], **_: object) -> list[float]:
    """A reward function: the share of a completion's ids that are under 200."""
    return [sum(token < 200 for token in ids) / len(ids) for ids in completion_ids]
