"""Joined rows, branches of one image or packed samples, give what their rows give one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.tiny_models import (
    LORA_TUNE,
    assert_close,
    batch_of,
    built,
    examples_of,
    loss_and_gradients,
    one_step,
    parsed,
    rows_of,
    tuned_by,
    wake_adapters,
    with_tune,
)
from vlm_tune.data.packing import pack_layout
from vlm_tune.data.prepare.run import prepare
from vlm_tune.data.types import IGNORE_INDEX, Example
from vlm_tune.generation import continuing
from vlm_tune.generation.answering import answer_prompts
from vlm_tune.model.language.causal import CausalLLM
from vlm_tune.model.language.decoding import Decoding


@pytest.fixture
def many_questions(color_rows: Path) -> Path:
    """Between two and five questions of different lengths an image."""
    rows = [json.loads(line) for line in color_rows.read_text().splitlines()]
    extra = [
        {
            "messages": [
                {"role": "user", "content": "tell me " * (place + 2)},
                {"role": "assistant", "content": "it is plain" * (place + 1)},
            ],
            "images": rows[image]["images"],
        }
        for place, image in enumerate((0, 0, 2, 0))
    ]
    color_rows.write_text("".join(json.dumps(row) + "\n" for row in rows + extra))
    return color_rows


def joined(model: Any, recipe: Any) -> list[Example]:
    """The recipe's rows, one example an image."""
    grouped = recipe.data.model_copy(update={"group": "image"})
    examples = examples_of(prepare(grouped, grouped.train, model.processor, seed=recipe.seed))
    assert len(examples) == 4
    assert all(example.visible_until is not None for example in examples)
    return examples


def test_losses_and_lora_gradients_equal_rows_one_by_one(
    many_questions: Path, tiny_recipe: Callable[..., str]
) -> None:
    recipe = parsed(with_tune(tiny_recipe("causal")))
    model = built(recipe)
    tuned_by(model, recipe)
    wake_adapters(model)
    rows = [example for row in rows_of(recipe) for example in model.processor.examples(row)]
    branches = joined(model, recipe)
    assert sum(len(example.input_ids) for example in branches) < 0.85 * sum(
        len(example.input_ids) for example in rows
    )
    alone, expected = loss_and_gradients(model, [batch_of(model, [example]) for example in rows])
    together, gradients = loss_and_gradients(model, [batch_of(model, branches)])
    assert any("lora_A" in name for name in gradients)
    assert float(together) == pytest.approx(float(alone), rel=1e-5)
    assert_close(gradients, expected)


def test_a_step_through_the_loop_is_the_same(
    many_questions: Path, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    steps = {}
    for group, size in (("none", 12), ("image", 4)):
        changes: dict[str, Any] = {
            "data__group": group,
            "train__batch_size": size,
            "train__steps": 1,
            "train__max_grad_norm": None,
        }
        recipe = parsed(with_tune(tiny_recipe("causal"), LORA_TUNE), **changes, train__log_every=1)
        steps[group] = one_step(recipe, tmp_path / group, prepare_model=wake_adapters)
    assert steps["image"][0] == pytest.approx(steps["none"][0], rel=1e-5)
    assert_close(steps["image"][1], steps["none"][1])


@torch.no_grad()
def test_no_branch_sees_another(many_questions: Path, tiny_recipe: Callable[..., str]) -> None:
    recipe = parsed(tiny_recipe("causal"))
    model = built(recipe).eval()
    example = joined(model, recipe)[0]
    visible_until, length = example.visible_until, len(example.input_ids)
    assert visible_until is not None and example.questions == 5

    def logits(ids: np.ndarray) -> torch.Tensor:
        batch = batch_of(model, [replace(example, input_ids=ids)])
        return model.llm.supervised_logits(model.embed(batch), batch)

    places, before = np.flatnonzero(example.labels != IGNORE_INDEX), logits(example.input_ids)
    for changed in range(int(example.image_mask.sum()) + 1, length):
        if not example.image_mask[changed]:
            ids = example.input_ids.copy()
            ids[changed] = 200 if ids[changed] != 200 else 201
            moved = (logits(ids) != before).any(1).numpy()
            sees = (places >= changed) & (places < visible_until[changed])
            # Bit for bit: a position that does not see the token computes the same.
            assert not moved[~sees].any()
            assert moved[sees].all()


@torch.no_grad()
def test_branched_and_plain_rows_share_a_batch(
    many_questions: Path, tiny_recipe: Callable[..., str]
) -> None:
    recipe = parsed(tiny_recipe("causal"))
    model = built(recipe).eval()
    plain = [example for row in rows_of(recipe) for example in model.processor.examples(row)][:2]
    mixed = [joined(model, recipe)[0], *plain]
    together: Any = model(batch_of(model, mixed))
    alone: list[Any] = [model(batch_of(model, [example])) for example in mixed]
    assert float(together.sum) == pytest.approx(sum(float(one.sum) for one in alone), rel=1e-5)


# --- packing -----------------------------------------------------------------------------------


def packed_rows(model: Any, examples: list[Example]) -> list[Example]:
    """The examples in two rows, and one alone."""
    layout = model.processor.spec.layout
    return [pack_layout(examples[:3], layout), pack_layout(examples[3:-1], layout), examples[-1]]


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_packed_rows_give_the_losses_and_gradients_of_padded_ones(
    kind: str, many_questions: Path, tiny_recipe: Callable[..., str]
) -> None:
    recipe = parsed(with_tune(tiny_recipe(kind)))
    model = built(recipe)
    tuned_by(model, recipe)
    wake_adapters(model)
    rows = [example for row in rows_of(recipe) for example in model.processor.examples(row)]
    packed = packed_rows(model, rows)
    assert {len(example.media) for example in packed} != {1}
    padded, expected = loss_and_gradients(model, [batch_of(model, rows)])
    together, gradients = loss_and_gradients(model, [batch_of(model, packed)])
    assert any("lora_A" in name for name in gradients)
    assert float(together) == pytest.approx(float(padded), rel=1e-5)
    assert_close(gradients, expected)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@torch.no_grad()
def test_no_packed_sample_sees_another(
    kind: str, many_questions: Path, tiny_recipe: Callable[..., str]
) -> None:
    recipe = parsed(tiny_recipe(kind))
    model = built(recipe).eval()
    rows = [example for row in rows_of(recipe) for example in model.processor.examples(row)][:4]

    def logits(changed: int | None) -> list[torch.Tensor]:
        chosen = list(rows)
        if changed is not None:
            ids = np.where(
                rows[changed].image_mask,
                rows[changed].input_ids,
                (rows[changed].input_ids + 1) % 300,
            )
            chosen[changed] = replace(rows[changed], input_ids=ids.astype(np.int32))
        batch = batch_of(model, [pack_layout(chosen, kind)])
        supervised = model.llm.supervised_logits(model.embed(batch), batch)
        return list(supervised.split([row.supervised for row in rows]))

    before = logits(None)
    for changed in range(len(rows)):
        for sample, (one, other) in enumerate(zip(before, logits(changed), strict=True)):
            assert torch.equal(one, other) == (sample != changed)


def test_packed_branches_are_the_rows_one_by_one(
    many_questions: Path, tiny_recipe: Callable[..., str]
) -> None:
    recipe = parsed(tiny_recipe("causal"))
    model = built(recipe)
    rows = [example for row in rows_of(recipe) for example in model.processor.examples(row)]
    alone, expected = loss_and_gradients(model, [batch_of(model, [example]) for example in rows])
    together, gradients = loss_and_gradients(
        model, [batch_of(model, [pack_layout(joined(model, recipe), "causal")])]
    )
    assert float(together) == pytest.approx(float(alone), rel=1e-5)
    assert_close(gradients, expected)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_a_packed_step_through_the_loop_is_the_same(
    kind: str, many_questions: Path, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    steps = {}
    for packing, size in ((False, 12), (True, 3)):
        changes: dict[str, Any] = {
            "data__packing": packing,
            "data__row_length": 256,
            "train__batch_size": size,
            "train__steps": 1,
        }
        recipe = parsed(
            with_tune(tiny_recipe(kind)), **changes, train__max_grad_norm=None, train__log_every=1
        )
        steps[packing] = one_step(recipe, tmp_path / str(packing), prepare_model=wake_adapters)
    assert steps[True][0] == pytest.approx(steps[False][0], rel=1e-5)
    assert_close(steps[True][1], steps[False][1])


# --- answers -----------------------------------------------------------------------------------


def test_answers_of_joined_prompts_are_those_one_by_one(
    many_questions: Path, tiny_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parsed(tiny_recipe("causal"))
    model = built(recipe).eval()
    for parameter in model.llm.model.parameters():
        parameter.data *= (
            3  # sharper than at initialisation, so that texts depend on image and question
        )
    prompts = model.processor.prompts(rows_of(recipe))
    decoding, fetch = Decoding(12), model.processor.images
    calls: list[int] = []
    plain = CausalLLM.branches

    def note(self: CausalLLM, embeds: torch.Tensor, *arguments: Any) -> Any:
        calls.append(len(embeds))
        return plain(self, embeds, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CausalLLM, "branches", note)
        together = answer_prompts(model, prompts, decoding, fetch=fetch, batch_size=7)
    assert sum(calls) == 4  # a row an image
    assert together == [
        answer_prompts(model, [prompt], decoding, fetch=fetch)[0] for prompt in prompts
    ]
    assert len(set(together)) > 4
    for share in (0.0, 2.0):  # no branch that has ended is let go, or each as soon as it can be
        monkeypatch.setattr(continuing, "SPARED", share)
        assert answer_prompts(model, prompts, decoding, fetch=fetch, batch_size=7) == together
    reached: list[tuple[int, int]] = []
    beams = answer_prompts(
        model,
        prompts,
        Decoding(12, num_beams=2),
        fetch=fetch,
        progress=lambda done, of: reached.append((done, of)),
    )
    assert len(beams) == len(prompts) and reached[-1] == (len(prompts), len(prompts))
