"""Sampled completions: generation and training agree, and a step is the same however divided."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.forked_runs import ended, start
from tests.helpers.policy_samples import (
    assert_equally_likely,
    completions_batch,
    drawn_answers,
    drawn_ids,
    policy_recipe,
    prompt_batches,
    prompts_of,
    rewards_of,
    sampler_of,
)
from tests.helpers.preference_samples import awake, objective_of
from tests.helpers.tiny_models import assert_close, batch_of, largest, tensors_of
from vlm_tune.api import grpo
from vlm_tune.data.batch import Batch
from vlm_tune.data.packing import completed

PLAIN = {"train__batch_size": 8}
GROUPED = {"data__group": "image", "train__batch_size": 4}


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("causal", PLAIN), ("causal", GROUPED), ("seq2seq", PLAIN), ("seq2seq", GROUPED)],
    ids=["decoder", "decoder by image", "T5", "T5 by image"],
)
def test_generation_and_training_find_completions_equally_likely(
    kind: str, changes: dict[str, Any], tiny_recipe: Callable[..., str]
) -> None:
    recipe = policy_recipe(tiny_recipe, kind, **changes)
    model = awake(recipe)
    batches = prompt_batches(model, recipe)
    prompts = [prompt for batch in batches for unit in batch.prompts for prompt in unit]
    assert len(prompts) == 8 and sum(len(batch.input_ids) for batch in batches) == 8
    expected = drawn_answers(model, recipe, batches, 4)
    assert len({answer.ids for answer in expected}) > 16
    trained: list[tuple[tuple[int, ...], list[float]]] = []
    for batch in sampler_of(model, recipe)(batches, 1, compiled=False):
        completions = batch.completions
        assert completions is not None
        # A decoder reads the prompts of an image as branches too.
        joined = changes is GROUPED and kind == "causal"
        assert len(batch.input_ids) == (4 if joined else 8)
        with torch.no_grad():
            output: Any = model(batch, temperature=1.0)
        lengths = completions.lengths.tolist()
        rows = zip(
            batch.targets.split(lengths),
            output.logprobs.split(lengths),
            completions.ended.tolist(),
            strict=True,
        )
        for ids, logprobs, stopped in rows:
            end = len(ids) - stopped  # generation has no figure for the stop token
            trained.append((tuple(ids[:end].tolist()), logprobs[:end].tolist()))
    assert_equally_likely(trained, expected)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_branches_are_rows_and_micro_batches_are_one(
    kind: str, loss_type: str, tiny_recipe: Callable[..., str]
) -> None:
    objective = {"loss_type": loss_type, "temperature": 0.8, "scale_rewards": "batch"}
    recipe = policy_recipe(tiny_recipe, kind, objective=objective)
    model = awake(recipe)
    prompts = prompts_of(model, recipe, 3)
    ids = drawn_ids(3, 4, 200)
    rewards = rewards_of(3, 4)
    grpo_objective = objective_of(model, recipe)

    def step(batches: list[Batch]) -> dict[str, torch.Tensor]:
        counts = [grpo_objective.counts(batch) for batch in batches]
        totals = type(counts[0])(sum(count.items for count in counts))
        model.zero_grad(set_to_none=True)
        grpo_objective.before(model, batches, totals)
        for batch in batches:
            (grpo_objective(model, batch, totals).sum / totals.items).backward()
        return gradients_of(model)

    whole = step([completions_batch(model, prompts, ids, rewards)])
    apart = [
        completions_batch(model, [prompt], [group], rewards[4 * place : 4 * place + 4])
        for place, (prompt, group) in enumerate(zip(prompts, ids, strict=True))
    ]
    assert_close(step(apart), whole)

    # Row by row: of an unchanged model, the gradient is that of the weighted log-probabilities.
    groups = rewards.view(3, 4)
    worth = ((groups - groups.mean(1, keepdim=True)) / (rewards.std() + 1e-4)).flatten()
    rows = [
        completed(prompt, each, kind)
        for prompt, group in zip(prompts, ids, strict=True)
        for each in group
    ]
    tokens = sum(row.supervised for row in rows)
    model.zero_grad(set_to_none=True)
    for row, advantage in zip(rows, worth, strict=True):
        output: Any = model(batch_of(model, [row]), temperature=0.8)
        share = row.supervised * len(rows) if loss_type == "grpo" else tokens
        (-advantage * output.logprobs.sum() / share).backward()
    assert_close(gradients_of(model), whole)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{"kind": "ddp"}, {"kind": "deepspeed", "stage": 2}], ids=str)
def test_two_ranks_train_as_one(
    engine: dict[str, Any], tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    def recipe(output: str, size: int, **changes: Any) -> Any:
        return policy_recipe(
            tiny_recipe,
            "causal",
            output=output,
            objective={
                "beta": 0.1,
                "scale_rewards": "batch",
                "num_iterations": 2,
                "reward_funcs": ["tests.helpers.policy_samples:low_share"],
            },
            train__steps=4,
            train__batch_size=size,
            data__validation=[],
            **changes,
        )

    def logged(output: str) -> list[dict[str, Any]]:
        lines = (tmp_path / output / "log.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == "train"]

    grpo(recipe("one", 4))
    together = recipe("two", 2, engine=engine)
    pids = start(partial(grpo, together), tmp_path / "ranks.txt", ranks=2)
    assert ended(pids) == [0, 0], (tmp_path / "ranks.txt.0").read_text()
    assert len(logged("one")) == len(logged("two")) == 4
    for alone, both in zip(logged("one"), logged("two"), strict=True):
        assert both["loss"] == pytest.approx(alone["loss"], rel=1e-3, abs=1e-6)
        assert both["metrics"] == pytest.approx(alone["metrics"], rel=1e-3, abs=1e-5)
    first, second = (tensors_of(tmp_path / output / "model") for output in ("one", "two"))
    assert first.keys() == second.keys()
    assert max(largest(value, second[name]) for name, value in first.items()) <= 3e-4
