"""CLIP's and SigLIP's losses: parity, what is learned, and what a checkpoint has of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip.loss
import pytest
import torch
from torch.nn.functional import logsigmoid, normalize

from tests.helpers.contrastive_samples import contrastive_recipe
from tests.helpers.tiny_models import assert_same_bits, batch_of, built, interrupted, rows_of
from vlm_tune.api import evaluate, merge, sft
from vlm_tune.config.objectives import Contrastive
from vlm_tune.data.batch import Batch
from vlm_tune.data.types import IGNORE_INDEX
from vlm_tune.model.checkpoint import load_model
from vlm_tune.model.similarity import Similarity
from vlm_tune.model.vlm import Alignment
from vlm_tune.train.contrastive import PairedObjective

LOSSES = ["clip", "siglip"]
ROWS = 5


def vectors(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(ROWS, 8, generator=generator), dim=-1).requires_grad_()


def batch_with_captions(captioned: int = ROWS) -> Batch:
    """Rows of two tokens, of which the first `captioned` have a caption."""
    labels = torch.full((ROWS, 2), 7)
    labels[captioned:] = IGNORE_INDEX
    mask = torch.ones(ROWS, 2, dtype=torch.bool)
    ids = [str(number) for number in range(ROWS)]
    return Batch(ids, labels.clamp(min=0), mask, ~mask, labels, torch.arange(ROWS))


def expected(
    loss: str, images: torch.Tensor, captions: torch.Tensor, similarity: Similarity
) -> torch.Tensor:
    """The formulas of the papers, summed over rows, by loops."""
    scale, bias = similarity()
    logits = scale * images @ captions.T + (0 if bias is None else bias)
    rows = range(len(images))
    if loss == "siglip":
        terms = [logsigmoid((1 if i == j else -1) * logits[i, j]) for i in rows for j in rows]
        return -torch.stack(terms).sum()
    terms = [(logits[i].logsumexp(0) + logits[:, i].logsumexp(0)) / 2 - logits[i, i] for i in rows]
    return torch.stack(terms).sum()


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradients_are_the_papers_and_open_clips(loss: str) -> None:
    images = vectors(0)
    captions = vectors(1)
    similarity = Similarity(0.2, -2.0 if loss == "siglip" else None)
    trained = [images, captions, *similarity.parameters()]

    def model(batch: Batch, *, align: bool) -> Alignment:
        assert align
        return Alignment(images, captions, *similarity())

    objective = PairedObjective(Contrastive(kind="contrastive", loss=loss))  # type: ignore[arg-type]
    ours = objective(model, batch_with_captions())
    assert ours.count == ROWS
    written = expected(loss, images, captions, similarity)
    theirs: Any = getattr(open_clip.loss, {"clip": "ClipLoss", "siglip": "SigLipLoss"}[loss])()
    reference = theirs(images, captions, *similarity()) * ROWS
    assert float(ours.sum.detach()) == pytest.approx(float(written.detach()), rel=1e-6)
    assert float(ours.sum.detach()) == pytest.approx(float(reference.detach()), rel=1e-6)
    gradients = torch.autograd.grad(ours.sum, trained)
    for gradient, other in zip(gradients, torch.autograd.grad(written, trained), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-6)
        assert float(gradient.abs().max()) > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_rows_that_fill_up_a_batch_are_no_negatives(loss: str) -> None:
    images = vectors(0)
    captions = vectors(1)
    similarity = Similarity(0.2, -2.0 if loss == "siglip" else None)

    def model(batch: Batch, *, align: bool) -> Alignment:
        return Alignment(images, captions, *similarity())

    objective = PairedObjective(Contrastive(kind="contrastive", loss=loss))  # type: ignore[arg-type]
    three = objective(model, batch_with_captions(3))
    assert three.count == 3
    assert float(three.sum.detach()) == pytest.approx(
        float(expected(loss, images[:3], captions[:3], similarity).detach()), rel=1e-6
    )
    none = objective(model, batch_with_captions(0))
    assert (float(none.sum.detach()), none.count) == (0.0, 0)


def test_the_scale_is_bounded_as_clips_and_comes_back() -> None:
    similarity = Similarity(0.001)
    scale, bias = similarity()
    assert bias is None and float(scale.detach()) == pytest.approx(100)
    scale.sum().backward()
    assert similarity.logit_scale.grad is not None
    assert float(similarity.logit_scale.grad) == pytest.approx(100)
    assert float(Similarity(0.07)()[0].detach()) == pytest.approx(1 / 0.07)
    assert float(Similarity(50.0)()[0].detach()) == pytest.approx(1)


@pytest.mark.parametrize(("loss", "kind"), [("clip", "seq2seq"), ("siglip", "causal")])
def test_a_run_learns_to_retrieve(
    loss: str, kind: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """From images of eight colors to others of the same colors, where chance is an eighth."""
    recipe = contrastive_recipe(
        tiny_recipe, tmp_path, loss, kind, train__steps=25, train__batch_size=8,
        train__learning_rate=0.01,
    )  # fmt: skip
    run = sft(recipe)
    for name in ("text_recall_1", "image_recall_1"):
        recall = run.result["metrics"][name]
        assert recall["value"] >= 0.75
        assert recall["low"] > 1 / 8
    similarity = run.model.similarity
    assert similarity is not None
    started = 1 / recipe.objective.temperature  # type: ignore[union-attr]
    assert abs(float(similarity()[0].detach()) - started) > 0.05
    again = evaluate(run.folder, split="test")
    assert (
        again.metrics["text_recall_1"]["value"] == run.result["metrics"]["text_recall_1"]["value"]
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_a_resumed_run_is_the_run_that_was_never_stopped(
    loss: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    changes = {"train__log_every": 1, "train__checkpoints": {"every": 2}}
    one = contrastive_recipe(tiny_recipe, tmp_path, loss, output="one", **changes)
    sft(one)
    two = contrastive_recipe(tiny_recipe, tmp_path, loss, output="two", **changes)
    interrupted(lambda show: sft(two, show=show), stage=0, step=2)
    sft(two, resume=True)
    assert_same_bits(tmp_path / "one" / "model", tmp_path / "two" / "model")
    saved = load_model(tmp_path / "two").similarity
    assert saved is not None and (saved.logit_bias is not None) == (loss == "siglip")


STAGES = [
    {"name": "align"},
    {
        "name": "instruct",
        "objective": {"kind": "language_modeling"},
        "tune": [
            {"match": "llm.*", "how": "lora", "r": 4},
            {"match": "*", "how": "frozen"},
        ],
    },
]


def test_a_later_stage_and_a_merge_keep_the_learned_scale(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    recipe = contrastive_recipe(
        tiny_recipe, tmp_path, "clip", stages=STAGES, data__test=[], train__steps=2
    )
    run = sft(recipe)
    (aligned,) = (run.folder / "stages" / "1-align" / "checkpoints").glob("step-*")
    merged = tmp_path / "merged"
    merge(run.folder, merged, dtype="fp32")
    learned = [load_model(folder).similarity for folder in (aligned, run.folder, merged)]
    scales = [float(each.logit_scale.detach()) for each in learned if each is not None]
    assert len(scales) == 3 and len(set(scales)) == 1
    assert scales[0] != pytest.approx(-math.log(0.07), abs=1e-6)


def test_the_gradient_of_the_whole_model_is_that_of_the_formula(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    recipe = contrastive_recipe(tiny_recipe, tmp_path, "clip")
    model = built(recipe)
    model.similarity = Similarity(0.1)
    batch = batch_of(model, [model.processor.examples(row)[-1] for row in rows_of(recipe)[:4]])
    objective = PairedObjective(Contrastive(kind="contrastive", loss="clip"))
    trained = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(("connector", "similarity")) or "embed_tokens" in name
    }
    ours = torch.autograd.grad(objective(model, batch).sum, list(trained.values()))
    aligned: Any = model(batch, align=True)
    written = expected("clip", aligned.images, aligned.captions, model.similarity)
    theirs = torch.autograd.grad(written, list(trained.values()))
    for name, gradient, other in zip(trained, ours, theirs, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6, msg=name)
