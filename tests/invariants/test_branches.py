"""Questions about one image as branches of one row give what they give one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import (
    LORA_TUNE,
    assert_close,
    batch_of,
    built,
    largest,
    loss_and_gradients,
    one_step,
    parsed,
    rows_of,
    tuned_by,
    wake_adapters,
    with_tune,
)

from vlm_tune.data.prepare import prepare
from vlm_tune.data.types import IGNORE_INDEX, Example


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
    found = [example for group in prepare(rows_of(recipe), grouped, model.processor).groups for example in group]
    assert len(found) == 4
    assert all(example.branches is not None for example in found)
    return found


def test_losses_and_lora_gradients_equal_rows_one_by_one(many_questions: Path, tiny_recipe: Callable[..., str]) -> None:
    recipe = parsed(with_tune(tiny_recipe("causal")))
    model = built(recipe)
    tuned_by(model, recipe)
    wake_adapters(model)
    rows = [example for row in rows_of(recipe) for example in model.processor.examples(row)]
    branches = joined(model, recipe)
    assert sum(len(example.input_ids) for example in branches) < 0.85 * sum(len(example.input_ids) for example in rows)
    alone, expected = loss_and_gradients(model, [batch_of(model, [example]) for example in rows])
    together, found = loss_and_gradients(model, [batch_of(model, branches)])
    assert any("lora_A" in name for name in found)
    assert float(together) == pytest.approx(float(alone), rel=1e-5)
    assert_close(found, expected)


def test_a_step_through_the_loop_is_the_same(many_questions: Path, tiny_recipe: Callable[..., str], tmp_path: Path) -> None:
    found = {}
    for group, size in (("none", 12), ("image", 4)):
        changes: dict[str, Any] = {"data__group": group, "train__batch_size": size, "train__steps": 1, "train__max_grad_norm": None}
        recipe = parsed(with_tune(tiny_recipe("causal"), LORA_TUNE), **changes, train__log_every=1)
        found[group] = one_step(recipe, tmp_path / group, prepare_model=wake_adapters)
    assert found["image"][0] == pytest.approx(found["none"][0], rel=1e-5)
    assert_close(found["image"][1], found["none"][1])


@torch.no_grad()
def test_no_branch_sees_another(many_questions: Path, tiny_recipe: Callable[..., str]) -> None:
    recipe = parsed(tiny_recipe("causal"))
    model = built(recipe).eval()
    example = joined(model, recipe)[0]
    assert example.branches is not None
    branches = example.branches

    def loss_of(branch: int, ids: np.ndarray) -> torch.Tensor:
        labels = np.where(branches == branch, example.labels, IGNORE_INDEX)
        found: Any = model(batch_of(model, [replace(example, input_ids=ids, labels=labels)]))
        return found.sum

    count = int(branches.max())
    assert count == 5
    for changed in range(1, count + 1):
        ids = np.where(branches == changed, example.input_ids[::-1] % 50 + 200, example.input_ids).astype(np.int32)
        assert not np.array_equal(ids, example.input_ids)
        for branch in range(1, count + 1):
            difference = largest(loss_of(branch, ids), loss_of(branch, example.input_ids))
            assert (difference > 1e-4) if branch == changed else (difference == 0)
    prefix = np.where((branches == 0) & ~example.image_mask, 201, example.input_ids).astype(np.int32)
    assert all(largest(loss_of(branch, prefix), loss_of(branch, example.input_ids)) > 1e-6 for branch in range(1, count + 1))


@torch.no_grad()
def test_branched_and_plain_rows_share_a_batch(many_questions: Path, tiny_recipe: Callable[..., str]) -> None:
    recipe = parsed(tiny_recipe("causal"))
    model = built(recipe).eval()
    plain = [example for row in rows_of(recipe) for example in model.processor.examples(row)][:2]
    mixed = [joined(model, recipe)[0], *plain]
    together: Any = model(batch_of(model, mixed))
    alone: list[Any] = [model(batch_of(model, [example])) for example in mixed]
    assert float(together.sum) == pytest.approx(sum(float(one.sum) for one in alone), rel=1e-5)
