"""Two augmented views of an image: NT-Xent, and runs that learn by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from tests.helpers.contrastive_samples import contrastive_recipe
from tests.helpers.tiny_models import assert_same_bits, batch_of, built, interrupted, rows_of
from vlm_tune.api import sft
from vlm_tune.config.objectives import Contrastive
from vlm_tune.config.recipe import Recipe
from vlm_tune.errors import RecipeError
from vlm_tune.events import TrainSteps
from vlm_tune.model.similarity import Similarity
from vlm_tune.train.contrastive import PairedObjective, ViewsObjective, nt_xent, single_rank
from vlm_tune.train.objective_registry import build_objective
from vlm_tune.train.objectives import Objective

AUGMENT = {"flip": 0.5, "shift": 0.2, "crop": 0.6}
TUNE = [
    {"match": "llm.*", "how": "frozen"},
    {"match": "*", "how": "full"},
]


def views_recipe(
    tiny_recipe: Callable[..., str], folder: Path, views: str, **changes: Any
) -> Recipe:
    """A recipe that trains tower and connector on two views of eight images."""
    settings: dict[str, Any] = {
        "objective": {"kind": "contrastive", "views": views, "temperature": 0.2},
        "data__augment": AUGMENT,
        "tune": TUNE,
        "train__batch_size": 8,
        "data__test": [],
    }
    if views == "image_image":
        settings["data__validation"] = []
    return contrastive_recipe(tiny_recipe, folder, "captions", **(settings | changes))


def objective_of(**settings: Any) -> Objective:
    config = Contrastive(kind="contrastive", **settings)
    return build_objective(config, None, lambda total: total, torch.device("cpu"), single_rank)


def test_nt_xent_is_the_papers_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    firsts, seconds = (
        normalize(torch.randn(5, 6, generator=generator), dim=-1).requires_grad_() for _ in "12"
    )
    views = [*firsts, *seconds]
    terms = []
    for i, view in enumerate(views):
        pair = views[(i + 5) % 10]
        others = torch.stack([(view @ other) / 0.3 for j, other in enumerate(views) if j != i])
        terms.append(others.logsumexp(0) - (view @ pair) / 0.3)
    expected = torch.stack(terms).mean()
    loss = nt_xent(firsts, seconds, 0.3)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    ours = torch.autograd.grad(loss, [firsts, seconds])
    for gradient, other in zip(ours, torch.autograd.grad(expected, [firsts, seconds]), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", ["captions", "clip", "siglip"])
def test_both_is_the_sum_of_the_two(
    loss: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    recipe = views_recipe(tiny_recipe, tmp_path, "both")
    model = built(recipe)
    if loss != "captions":
        model.similarity = Similarity(0.2, -2.0 if loss == "siglip" else None)
    batch = batch_of(model, [model.processor.examples(row)[-1] for row in rows_of(recipe)[:5]])
    assert batch.pixels is not None
    batch.views = batch.pixels.flip(-1)
    settings = {"loss": loss, "temperature": 0.2}
    objective = objective_of(views="both", **settings)
    both = objective(model, batch)
    assert isinstance(objective, ViewsObjective)
    assert isinstance(objective.text, PairedObjective) == (loss != "captions")
    text = objective_of(**settings)(model, batch)
    images = objective_of(views="image_image", temperature=0.2)(model, batch)
    assert both.count == text.count == images.count == 5
    expected = float((text.sum + images.sum).detach())
    assert float(both.sum.detach()) == pytest.approx(expected, rel=1e-6)


def test_the_feed_augments_each_image_twice_and_the_same_way_again(
    tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run sees the views that an uninterrupted one does."""
    seen: list[Any] = []
    call = ViewsObjective.__call__

    def noted(self: ViewsObjective, model: Any, batch: Any, totals: Any = None) -> Any:
        seen.append((batch.pixels.clone(), batch.views.clone()))
        return call(self, model, batch, totals)

    monkeypatch.setattr(ViewsObjective, "__call__", noted)
    changes: Any = {"train__log_every": 1, "train__checkpoints": {"every": 2}, "train__steps": 4}
    one, two = (
        views_recipe(tiny_recipe, tmp_path, "image_image", output=output, **changes)
        for output in ("one", "two")
    )
    sft(one)
    interrupted(lambda show: sft(two, show=show), stage=0, step=2)
    sft(two, resume=True)
    assert_same_bits(tmp_path / "one" / "model", tmp_path / "two" / "model")
    assert len(seen) == 8
    for pixels, views in seen:
        assert pixels.shape == views.shape and bool((pixels != views).flatten(1).any(1).all())
    for first, again in zip(seen[:4], seen[4:], strict=True):
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_a_run_learns_which_views_are_of_one_image(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """From the loss of chance, the logarithm of the 15 other views."""
    events: list[Any] = []
    recipe = views_recipe(
        tiny_recipe, tmp_path, "image_image", train__steps=40, train__log_every=10,
        train__learning_rate=0.003,
    )  # fmt: skip
    sft(recipe, show=events.append)
    losses = [event.loss for event in events if isinstance(event, TrainSteps)]
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize(
    ("views", "changes", "message"),
    [
        ("image_image", {"data__augment": None}, "set data.augment"),
        ("both", {"data__augment": None}, "set data.augment"),
        ("image_image", {"objective__loss": "clip"}, "loss compares images and captions"),
        ("image_image", {"data__validation": [{"kind": "file", "path": "x"}]}, "no answers"),
        ("image_image", {"data__test": [{"kind": "file", "path": "x"}]}, "no answers"),
        ("both", {"train__batch_size": 1}, "one row has no negatives"),
    ],
)
def test_settings_that_views_are_not_for(
    views: str,
    changes: dict[str, Any],
    message: str,
    tiny_recipe: Callable[..., str],
    tmp_path: Path,
) -> None:
    with pytest.raises(RecipeError, match=message):
        views_recipe(tiny_recipe, tmp_path, views, **changes)
