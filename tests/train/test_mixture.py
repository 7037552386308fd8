"""Several objectives at once: the weighted sum of their gradients, and runs that learn both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.contrastive_samples import contrastive_recipe, write_captions
from tests.helpers.tiny_models import (
    assert_same_bits,
    batch_of,
    built,
    interrupted,
    rows_of,
    tuned_by,
)
from vlm_tune.api import sft
from vlm_tune.config.objectives import parts_of
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.batch import Batch
from vlm_tune.events import TrainSteps
from vlm_tune.train.contrastive import single_rank
from vlm_tune.train.objective_registry import build_objective
from vlm_tune.train.objectives import Counts, Objective

LANGUAGE = {"kind": "language_modeling"}
CLIP = {"kind": "contrastive", "loss": "clip"}
CAPTIONS = {"kind": "contrastive"}
MATCHING = {"kind": "matching"}


def mixed_recipe(
    tiny_recipe: Callable[..., str], folder: Path, objectives: list[Any], **changes: Any
) -> Recipe:
    """A recipe of captions that trains all but the tower by several objectives."""
    tune = [{"match": "tower.*", "how": "frozen"}, {"match": "*", "how": "full"}]
    settings = {"objective": objectives, "tune": tune, "train__batch_size": 8}
    return contrastive_recipe(tiny_recipe, folder, "clip", **(settings | changes))


def apart_recipe(
    tiny_recipe: Callable[..., str], folder: Path, objectives: list[Any], **changes: Any
) -> Recipe:
    """A recipe that learns to answer with captions, and whether they match, from a source each."""
    rows = str(write_captions(folder, "train", 0))
    settings = {
        "data__group": "none",
        "data__train": [
            {"kind": "file", "path": rows, "objective": "language_modeling"},
            {"kind": "file", "path": rows, "form": "match", "objective": "matching"},
        ],
    }
    return mixed_recipe(tiny_recipe, folder, objectives, **(settings | changes))


def objective_of(recipe: Recipe, objective: Any = None) -> Objective:
    config = objective or recipe.objective
    return build_objective(config, None, lambda total: total, torch.device("cpu"), single_rank)


def mean_gradients(
    model: Any, objective: Objective, batches: Sequence[Batch]
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and gradients of a step of micro-batches, as the trainer takes them."""
    torch.manual_seed(0)
    totals = sum(map(objective.counts, batches), Counts(0))
    objective.before(model, batches, totals)
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        share = objective(model, batch, totals).sum / totals.items
        share.backward()
        total += float(share.detach())
    named = model.named_parameters()
    return total, {name: each.grad for name, each in named if each.grad is not None}


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_a_mixtures_gradient_is_the_weighted_sum_of_its_parts(
    kind: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """Of two micro-batches of other sizes, each part's loss is a mean over the step."""
    parts = [{**LANGUAGE, "weight": 0.5}, {**CLIP, "weight": 2.0}]
    recipe = mixed_recipe(tiny_recipe, tmp_path, parts, kind=kind)
    model = built(recipe)
    tuned_by(model, recipe)
    examples = [model.processor.examples(row)[-1] for row in rows_of(recipe)]
    batches = [batch_of(model, examples[:5]), batch_of(model, examples[5:])]
    loss, gradients = mean_gradients(model, objective_of(recipe), batches)
    apart = [
        mean_gradients(model, objective_of(recipe, part), batches)
        for part in parts_of(recipe.objective)
    ]
    assert loss == pytest.approx(0.5 * apart[0][0] + 2.0 * apart[1][0], rel=1e-6)
    for name, gradient in gradients.items():
        expected = sum(
            weight * part[name]
            for weight, (_, part) in zip((0.5, 2.0), apart, strict=True)
            if name in part
        )
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_rows_train_the_objective_that_their_source_names(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    parts = [LANGUAGE, {**MATCHING, "negatives": "random", "weight": 3.0}]
    recipe = apart_recipe(tiny_recipe, tmp_path, parts)
    model = built(recipe)
    examples = [model.processor.examples(row)[-1] for row in rows_of(recipe)]
    captions, matches = batch_of(model, examples[:8]), batch_of(model, examples[8:])
    captions.objective, matches.objective = "language_modeling", "matching"
    _, gradients = mean_gradients(model, objective_of(recipe), [captions, matches])
    language, matching = parts_of(recipe.objective)
    _, first = mean_gradients(model, objective_of(recipe, language), [captions])
    _, second = mean_gradients(model, objective_of(recipe, matching), [matches])
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, first[name] + 3.0 * second[name], rtol=1e-4, atol=1e-6, msg=name
        )


def test_a_mixture_of_one_trains_as_its_part(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    one = mixed_recipe(tiny_recipe, tmp_path, [LANGUAGE], output="one")
    alone = mixed_recipe(tiny_recipe, tmp_path, [], output="alone", objective=LANGUAGE)
    for recipe in (one, alone):
        sft(recipe)
    assert_same_bits(tmp_path / "one" / "model", tmp_path / "alone" / "model")


@pytest.mark.parametrize("apart", [False, True], ids=["all rows", "by source"])
def test_a_run_learns_by_both_and_resumes_to_the_bit(
    apart: bool, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    objectives = [LANGUAGE, MATCHING if apart else CAPTIONS]
    make = apart_recipe if apart else mixed_recipe
    changes: Any = {
        "train__steps": 12,
        "train__log_every": 1,
        "train__learning_rate": 0.01,
        "train__checkpoints": {"every": 6},
        "data__test": [],
    }
    one = make(tiny_recipe, tmp_path, objectives, output="one", **changes)
    events: list[Any] = []
    sft(one, show=events.append)
    kinds = [each["kind"] for each in objectives]
    logged = [event.metrics or {} for event in events if isinstance(event, TrainSteps)]
    for kind in kinds:
        losses = [metrics[f"{kind}/loss"] for metrics in logged if f"{kind}/loss" in metrics]
        assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    two = make(tiny_recipe, tmp_path, objectives, output="two", **changes)
    interrupted(lambda show: sft(two, show=show), stage=0, step=6)
    sft(two, resume=True)
    assert_same_bits(tmp_path / "one" / "model", tmp_path / "two" / "model")
