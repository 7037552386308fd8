"""However a step's rows are split into micro-batches, loss and gradient are those of the whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny_models import (
    assert_close,
    batch_of,
    built,
    loss_and_gradients,
    one_step,
    parsed,
    rows_of,
    tuned_by,
)

ANSWERS = [
    "red",
    "a very long answer with a great many words in it, and then some more",
    "no",
    "two words",
]


@pytest.fixture
def uneven_rows(color_rows: Path) -> Path:
    """The eight questions with answers of very different lengths."""
    rows = [json.loads(line) for line in color_rows.read_text().splitlines()]
    for place, row in enumerate(rows):
        row["messages"][1]["content"] = ANSWERS[place % 4] + " ," * place
    del rows[3]["images"]  # a row of text only
    color_rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return color_rows


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_any_accumulation_gives_the_same_gradient(
    kind: str, uneven_rows: Path, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    steps: dict[tuple[int, int], Any] = {}
    for size, accumulation in ((8, 1), (1, 8), (3, 3)):
        changes: dict[str, Any] = {
            "train__batch_size": size,
            "train__gradient_accumulation": accumulation,
            "train__steps": 1,
        }
        recipe = parsed(tiny_recipe(kind), **changes, train__max_grad_norm=None, train__log_every=1)
        steps[size, accumulation] = one_step(recipe, tmp_path / f"{size}x{accumulation}")
    loss, gradients = steps[8, 1]
    for other in ((1, 8), (3, 3)):
        assert steps[other][0] == pytest.approx(loss, rel=1e-5)
        assert_close(gradients, steps[other][1])
    # The mean of the rows' means, as trainers take it that divide every micro-batch by its own
    # tokens, is another number.
    recipe = parsed(tiny_recipe(kind))
    model = built(recipe)
    means = []
    for row in rows_of(recipe):
        batch = batch_of(model, model.processor.examples(row))
        means.append(float(loss_and_gradients(model, [batch])[0]) / batch.supervised)
    assert abs(sum(means) / len(means) - loss) > 1e-3 * loss


def test_the_logged_loss_is_the_mean_over_tokens(
    uneven_rows: Path, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    recipe = parsed(tiny_recipe("seq2seq"), train__steps=1, train__batch_size=8, train__log_every=1)
    loss, _ = one_step(recipe, tmp_path / "run")
    model = built(recipe)
    batch = batch_of(
        model, [example for row in rows_of(recipe) for example in model.processor.examples(row)]
    )
    assert loss == pytest.approx(
        float(loss_and_gradients(model, [batch])[0]) / batch.supervised, rel=1e-5
    )


def test_losses_are_multiplied_by_the_weight_of_their_source(
    uneven_rows: Path, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    rows = uneven_rows.read_text().splitlines(keepends=True)
    halves = [uneven_rows.with_name(f"{name}.jsonl") for name in ("first", "second")]
    for path, half in zip(halves, (rows[:5], rows[5:]), strict=True):
        path.write_text("".join(half))
    text = tiny_recipe("causal")
    steps: dict[tuple[int, int, bool], Any] = {}
    for size, accumulation, packing in ((8, 1, False), (2, 4, False), (8, 1, True)):
        recipe = parsed(
            text,
            data__train=[
                {"kind": "file", "path": str(halves[0])},
                {"kind": "file", "path": str(halves[1]), "loss_weight": 3},
            ],
            data__packing=packing,
            train__batch_size=size,
            train__gradient_accumulation=accumulation,
            train__steps=1,
            train__max_grad_norm=None,
            train__log_every=1,
        )
        folder = tmp_path / f"{size}x{accumulation}{packing}"
        steps[size, accumulation, packing] = one_step(recipe, folder)
    plain = parsed(text)
    model = built(parsed(text, data__train=[{"kind": "file", "path": str(p)} for p in halves]))
    tuned_by(model, plain)
    batches = [
        batch_of(model, [example for row in part for example in model.processor.examples(row)])
        for part in (rows_of(plain)[:5], rows_of(plain)[5:])
    ]
    sums, gradients = zip(*(loss_and_gradients(model, [each]) for each in batches), strict=True)
    count = sum(batch.supervised for batch in batches)
    for loss, weighted in steps.values():
        assert loss == pytest.approx(float(sums[0] + 3 * sums[1]) / count, rel=1e-5)
        wanted = {
            name: (value + 3 * gradients[1][name]) / count for name, value in gradients[0].items()
        }
        assert_close(wanted, weighted)
