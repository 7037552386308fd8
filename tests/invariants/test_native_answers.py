"""Answers to one prompt of a native model: branches are rows, and generation is training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.native_models import native_recipe
from tests.helpers.policy_samples import (
    assert_equally_likely,
    drawn_answers,
    policy_recipe,
    prompt_batches,
    sampler_of,
)
from tests.helpers.preference_samples import (
    awake,
    examples_of,
    objective_of,
    preference_text,
    step,
)
from tests.helpers.tiny_models import assert_close, batch_of, parsed
from vlm_tune.data.batching.collate import collate
from vlm_tune.data.packing import branch_layout, separate_rows
from vlm_tune.data.types import ANSWER_KINDS
from vlm_tune.generation.answering import prompt_answers
from vlm_tune.train import sampling

DPO = "{kind: dpo, beta: 0.5, loss_type: [sigmoid, sft], loss_weights: [1.0, 0.3]}"


def total(losses: list[Any]) -> float:
    return sum(float(loss.sum.detach()) for loss in losses)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_pairs_as_branches_are_pairs_as_rows(kind: str, tmp_path: Path) -> None:
    recipe = parsed(preference_text(native_recipe(tmp_path, kind), "causal", DPO))
    model = awake(recipe)
    spec = model.processor.spec
    assert spec.branches
    examples = examples_of(model, recipe)
    of_images = [*branch_layout(examples[:3], 512), *branch_layout(examples[3:5], 512)]
    assert [row.judged for row in of_images] == [3, 2]
    apart = replace(spec, branches=False)
    rows = collate(examples, apart, fetch=model.processor.images.inputs)
    assert len(rows.input_ids) == 14 and rows.visible_until is None
    expected, gradients = step(model, recipe, [rows])
    for batch in (batch_of(model, examples), batch_of(model, [*of_images, *examples[5:]])):
        losses, same = step(model, recipe, [batch])
        assert total(losses) == pytest.approx(total(expected), rel=1e-5)
        assert losses[0].metrics.keys() == expected[0].metrics.keys()
        assert_close(same, gradients)


@pytest.mark.parametrize("objective", [DPO, "{kind: kto, beta: 0.5}"], ids=["dpo", "kto"])
def test_micro_batches_of_separate_rows_are_one(objective: str, tmp_path: Path) -> None:
    text = preference_text(native_recipe(tmp_path, "lfm2_vl"), "causal", objective)
    recipe = parsed(text)
    model = awake(recipe)
    examples = examples_of(model, recipe)
    whole, gradients = step(model, recipe, [batch_of(model, examples)])
    divided, same = step(model, recipe, [batch_of(model, [example]) for example in examples])
    assert total(divided) == pytest.approx(total(whole), rel=1e-5)
    assert_close(same, gradients)


def test_separate_rows_have_images_and_numbers_of_their_own(tmp_path: Path) -> None:
    recipe = parsed(preference_text(native_recipe(tmp_path, "lfm2_vl"), "causal", DPO))
    model = awake(recipe)
    examples = examples_of(model, recipe)[3:5]
    examples = [
        replace(example, reference=torch.arange(3).numpy() + 10.0 * place)
        for place, example in enumerate(examples)
    ]
    batch = batch_of(model, examples)
    rows = [row for example in examples for row in separate_rows(example)]
    assert batch.ids == [row.id for row in rows] and len(rows) == 4
    assert batch.questions == 2
    assert batch.media_index.tolist() == [0, 1] * 4
    assert batch.answer_lengths is not None and batch.reference is not None
    lengths = batch.answer_lengths.view(-1, ANSWER_KINDS)
    assert lengths[:, :2].flatten().tolist() == [row.supervised for row in rows]
    assert batch.reference.tolist() == [0, 1, 2, 10, 11, 12]


@pytest.mark.parametrize(
    ("kind", "group"),
    [("qwen3_vl", "none"), ("qwen3_vl", "image"), ("qwen2_5_vl", "image"), ("lfm2_vl", "none")],
)
def test_generation_and_training_find_completions_equally_likely(
    kind: str, group: str, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"data__group": group, "train__batch_size": 7}
    recipe = policy_recipe(native_recipe(tmp_path, kind), "causal", **changes)
    model = awake(recipe)
    batches = prompt_batches(model, recipe)
    expected = drawn_answers(model, recipe, batches, 4)
    assert len(expected) == 28 and len({answer.ids for answer in expected}) > 16
    of_images = {*map(model.processor.encoder.control, model.processor.images.controls)}
    expected = [answer for answer in expected if of_images.isdisjoint(answer.ids)]
    assert len(expected) > 24
    trained: list[tuple[tuple[int, ...], list[float]]] = []
    for batch in sampler_of(model, recipe)(batches, 1, compiled=False):
        completions = batch.completions
        assert completions is not None
        trains = completions.trained
        joined = {"none": 7, "image": 4}[group]
        assert len(batch.input_ids) == (joined if model.processor.spec.branches else trains.sum())
        with torch.no_grad():
            output: Any = model(batch, temperature=1.0)
        lengths = completions.lengths[trains].tolist()
        ended = completions.ended[trains].tolist()
        of_rows = batch.targets.split(lengths), output.logprobs.split(lengths), ended
        for ids, logprobs, stopped in zip(*of_rows, strict=True):
            end = len(ids) - stopped  # generation has no figure for the stop token
            trained.append((tuple(ids[:end].tolist()), logprobs[:end].tolist()))
    assert_equally_likely(trained, expected)


@pytest.mark.parametrize("kind", ["qwen3_vl", "lfm2_vl"])
def test_completions_with_an_images_tokens_train_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward pass would look for another image."""
    recipe = policy_recipe(native_recipe(tmp_path, kind), "causal", train__batch_size=2)
    model = awake(recipe)
    image: Any = model.llm.model.config.image_token_id
    sampled = prompt_answers

    def with_image_token(*args: Any, **options: Any) -> list[Any]:
        answers = sampled(*args, **options)
        return [
            replace(first, ids=(image, *first.ids), alternatives=first.alternatives)
            for first in answers
        ]

    monkeypatch.setattr(sampling, "prompt_answers", with_image_token)
    batches = prompt_batches(model, recipe)
    objective = objective_of(model, recipe)
    for batch in sampler_of(model, recipe)(batches, 1, compiled=False):
        completions = batch.completions
        assert completions is not None
        assert completions.trained.view(-1, 4).tolist() == [[False, True, True, True]] * len(
            batch.prompts or completions.trained.view(-1, 4)
        )
        counts = objective.counts(batch)
        objective.before(model, [batch], counts)
        objective(model, batch, counts).sum.backward()
