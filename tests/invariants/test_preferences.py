"""Preferences: branches are rows, and a step is the same however it is divided."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid

from tests.helpers.forked_runs import ended, start
from tests.helpers.preference_samples import awake, examples_of, preference_text, step
from tests.helpers.tiny_models import assert_close, batch_of, parsed
from vlm_tune.api import dpo, kto
from vlm_tune.data.packing import branch_layout, pack_layout, separate_rows
from vlm_tune.data.types import ANSWER_KINDS, IGNORE_INDEX
from vlm_tune.model.lora import adapters_off

DPO = "{kind: dpo, beta: 0.5, loss_type: [sigmoid, sft], loss_weights: [1.0, 0.3]}"
OBJECTIVES = {
    "dpo": DPO,
    "simpo": "{kind: simpo, beta: 2.0, cpo_alpha: 0.5}",
    "orpo": "{kind: orpo, beta: 0.5}",
}


def total(losses: list[Any]) -> float:
    return sum(float(loss.sum.detach()) for loss in losses)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_eight_micro_batches_are_one(kind: str, name: str, tiny_recipe: Callable[..., str]) -> None:
    recipe = parsed(preference_text(tiny_recipe, kind, OBJECTIVES[name]))
    model = awake(recipe)
    examples = examples_of(model, recipe)
    whole, gradients = step(model, recipe, [batch_of(model, examples)])
    divided, same = step(model, recipe, [batch_of(model, [example]) for example in examples])
    assert total(divided) == pytest.approx(total(whole), rel=1e-5)
    assert sum(loss.count for loss in divided) == whole[0].count == 8
    assert_close(same, gradients)


@pytest.mark.parametrize("join", ["tree", "pack"])
def test_pairs_of_an_image_in_one_row_are_pairs_by_themselves(
    join: str, tiny_recipe: Callable[..., str]
) -> None:
    recipe = parsed(preference_text(tiny_recipe, "causal", DPO))
    model = awake(recipe)
    examples = examples_of(model, recipe)
    rows = [
        branch_layout(examples[start : start + 2], 256)[0]
        if join == "tree"
        else pack_layout(examples[start : start + 2], "causal")
        for start in range(0, 8, 2)
    ]
    assert len(rows) == 4 and all(row.judged == 2 for row in rows)
    apart, gradients = step(model, recipe, [batch_of(model, examples)])
    joined, same = step(model, recipe, [batch_of(model, rows)])
    assert total(joined) == pytest.approx(total(apart), rel=1e-5)
    assert_close(same, gradients)


def row_by_row(model: Any, examples: list[Any], beta: float) -> torch.Tensor:
    """DPO's summed loss of an encoder-decoder, an answer at a time through transformers."""
    theirs = model.llm.model

    def logprob(example: Any, number: int) -> torch.Tensor:
        chosen = example.answers == number
        labels = torch.tensor(example.labels[chosen])[None].long()
        embeds = model.embed(batch_of(model, [example]))
        logits = theirs(inputs_embeds=embeds, labels=labels).logits[0].float()
        return -cross_entropy(logits, labels[0], reduction="sum")

    losses = []
    for example in examples:
        with torch.no_grad(), adapters_off(model):
            before = [logprob(example, number) for number in (0, 1)]
        now = [logprob(example, number) for number in (0, 1)]
        ratios = [one - other for one, other in zip(now, before, strict=True)]
        losses.append(-logsigmoid(beta * (ratios[0] - ratios[1])))
    return torch.stack(losses).sum()


def test_an_encoder_decoder_equals_a_computation_answer_by_answer(
    tiny_recipe: Callable[..., str],
) -> None:
    recipe = parsed(preference_text(tiny_recipe, "seq2seq", "{kind: dpo, beta: 0.5}"))
    model = awake(recipe)
    examples = examples_of(model, recipe)
    (loss,), gradients = step(model, recipe, [batch_of(model, examples)])
    model.zero_grad(set_to_none=True)
    expected = row_by_row(model, examples, 0.5)
    (expected / len(examples)).backward()
    assert float(loss.sum.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert_close(
        gradients,
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
    )


def test_a_decoder_equals_a_computation_answer_by_answer(tiny_recipe: Callable[..., str]) -> None:
    recipe = parsed(preference_text(tiny_recipe, "causal", "{kind: dpo}"))
    model = awake(recipe)
    examples = examples_of(model, recipe)
    batch = batch_of(model, [branch_layout(examples[:2], 256)[0], *examples[2:]])
    with torch.no_grad():
        sums: Any = model(batch, by_answer=True)
        by_prompt = sums.sums.view(-1, ANSWER_KINDS)
        rows = [row for example in examples for row in separate_rows(example)]
        expected = []
        for row in rows:
            loss: Any = model(batch_of(model, [row]))
            expected.append(-loss.sum)
    assert sorted(by_prompt[:, :2].flatten().tolist()) == pytest.approx(
        sorted(float(each) for each in expected), rel=1e-5
    )
    assert (batch.labels != IGNORE_INDEX).sum() == sum(row.supervised for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [DPO, "{kind: kto, beta: 0.5}"], ids=["dpo", "kto"])
def test_two_ranks_train_as_one(
    objective: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    train = kto if "kto" in objective else dpo

    def recipe(output: str, size: int) -> Any:
        def make(kind: str) -> str:
            return tiny_recipe(kind, output=output)

        text = preference_text(make, "causal", objective, judged=train is kto)
        return parsed(
            text,
            train__steps=4,
            train__log_every=1,
            train__batch_size=size,
            evaluate__every=4,
            evaluate__samples=0,
        )

    def logged(output: str) -> list[dict[str, Any]]:
        lines = (tmp_path / output / "log.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines]
        return [event for event in events if event["event"] in ("train", "evaluate")]

    train(recipe("one", 4))
    pids = start(partial(train, recipe("two", 2)), tmp_path / "ranks.txt", ranks=2)
    assert ended(pids) == [0, 0], (tmp_path / "ranks.txt").read_text()
    assert len(logged("one")) == len(logged("two")) == 5
    for alone, together in zip(logged("one"), logged("two"), strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        figures = [
            {
                name: entry["value"] if isinstance(entry, dict) else entry
                for name, entry in event["metrics"].items()
            }
            for event in (together, alone)
        ]
        assert figures[0] == pytest.approx(figures[1], rel=1e-3, abs=1e-5)
