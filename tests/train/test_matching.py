"""Image-text matching: which images are negatives, what the loss is, and that a run learns it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize

from tests.helpers.contrastive_samples import matching_recipe
from tests.helpers.tiny_models import assert_same_bits, batch_of, built, interrupted, rows_of
from vlm_tune.api import evaluate, sft
from vlm_tune.config.objectives import Matching
from vlm_tune.data.batch import Batch
from vlm_tune.data.packing import separate_rows
from vlm_tune.data.types import Conversation
from vlm_tune.errors import DataError
from vlm_tune.train import matching
from vlm_tune.train.matching import MatchingObjective, negative_rows

KINDS = ["causal", "seq2seq"]


def objective_of(**settings: Any) -> MatchingObjective:
    return MatchingObjective(Matching(kind="matching", **settings))


def model_and_batch(tiny_recipe: Any, folder: Path, kind: str, rows: int = 4) -> tuple[Any, Any]:
    """A tiny model, and a batch and the conversations of the first rows."""
    recipe = matching_recipe(tiny_recipe, folder, kind)
    model = built(recipe)
    conversations = rows_of(recipe)[:rows]
    return model, conversations


def batch_of_rows(model: Any, rows: list[Conversation]) -> Batch:
    return batch_of(model, [example for row in rows for example in model.processor.examples(row)])


def answer_logprob(model: Any, row: Conversation, answer: str, image: Conversation) -> torch.Tensor:
    """log p(answer | the image of another row, the question of this one), by a row by itself."""
    media = iter(image.media)
    question = row.messages[0]
    parts = tuple(part if isinstance(part, str) else next(media) for part in question.parts)
    messages = (replace(question, parts=parts), replace(row.messages[-1], parts=(answer,)))
    (example,) = model.processor.examples(replace(row, messages=messages, rejected=None))
    batch = batch_of(model, [example])
    hidden, targets = model.llm.supervised(model.embed(batch), batch)
    return -cross_entropy(model.llm.logits(hidden), targets, reduction="sum")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_loss_and_gradients_are_the_binary_cross_entropy_row_by_row(
    kind: str,
    share: float,
    tiny_recipe: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where no row is shown another's image, and where both are shown that of the other."""
    monkeypatch.setattr(matching, "SHOWN_ANOTHER", share)
    model, rows = model_and_batch(tiny_recipe, tmp_path, kind, rows=2)
    batch = batch_of_rows(model, rows)
    objective = objective_of()
    assert objective.counts(batch).items == 2
    loss = objective(model, batch)
    assert loss.count == 2
    shown = rows[::-1] if share else rows
    margins = [
        answer_logprob(model, row, "yes", image) - answer_logprob(model, row, "no", image)
        for row, image in zip(rows, shown, strict=True)
    ]
    target = torch.full((2,), 1.0 - share)
    expected = binary_cross_entropy_with_logits(torch.stack(margins), target, reduction="sum")
    assert float(loss.sum.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    trained = [each for each in model.parameters() if each.requires_grad]
    ours = torch.autograd.grad(loss.sum, trained, allow_unused=True)
    theirs = torch.autograd.grad(expected, trained, allow_unused=True)
    for gradient, other in zip(ours, theirs, strict=True):
        if other is not None and gradient is not None:
            scale = max(float(other.abs().max()), 1e-2)
            torch.testing.assert_close(gradient, other, rtol=0, atol=2e-5 * scale)


def captions(*texts: str, images: list[int], categories: list[str]) -> Batch:
    """Rows whose prompts are the texts' letters, with the images of these numbers."""
    ids = torch.tensor([[ord(letter) for letter in text] for text in texts])
    mask = torch.ones_like(ids, dtype=torch.bool)
    names = [str(number) for number in range(len(texts))]
    return Batch(names, ids, mask, ~mask, ids, torch.tensor(images), categories=categories)


def test_negatives_are_images_that_no_row_shows_with_this_caption() -> None:
    batch = captions("aa", "bb", "aa", "cc", images=[0, 1, 2, 3], categories=["", "", "", "k"])
    assert negative_rows(batch).int().tolist() == [
        [0, 1, 0, 0],  # not the other image of the same caption, not another category
        [1, 0, 1, 0],
        [0, 1, 0, 0],
        [0, 0, 0, 0],
    ]
    # An image with two captions is no negative for either.
    batch = captions("aa", "bb", "cc", images=[0, 0, 1], categories=[""] * 3)
    assert negative_rows(batch).int().tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 0]]


@pytest.mark.parametrize("kind", KINDS)
def test_hard_negatives_are_the_images_nearest_to_the_caption(
    kind: str, tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "SHOWN_ANOTHER", 1.0)
    model, rows = model_and_batch(tiny_recipe, tmp_path, kind, rows=6)
    batch = batch_of_rows(model, rows)
    shown, another = objective_of(temperature=1e-6)._drawn_images(model, batch)
    assert bool(another.all())
    with torch.no_grad():
        images = normalize(model.media(batch).float().mean(1), dim=-1)
        words = torch.stack(
            [
                model.llm.embed(torch.tensor(model.processor.encoder.text(row.question, "text")))
                .float()
                .sum(0)
                for row in rows
            ]
        )
        nearest = normalize(words - words.mean(0), dim=-1) @ images.T
    nearest.fill_diagonal_(-torch.inf)
    assert shown.tolist() == nearest.argmax(1).tolist()
    draws = {tuple(objective_of(negatives="random")._drawn_images(model, batch)[0].tolist())}
    draws |= {
        tuple(objective_of(negatives="random")._drawn_images(model, batch)[0].tolist())
        for _ in range(4)
    }
    assert len(draws) > 1 and all(row[place] != place for row in draws for place in range(6))


def test_rows_of_different_numbers_of_images_are_an_error(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    model, rows = model_and_batch(tiny_recipe, tmp_path, "causal", rows=2)
    first = rows[0].messages[0]
    more = replace(first, parts=(*rows[1].media, *first.parts))
    rows[0] = replace(rows[0], messages=(more, rows[0].messages[1]))
    with pytest.raises(DataError, match="not as many each"):
        objective_of()(model, batch_of_rows(model, rows))


@pytest.mark.parametrize(
    ("kind", "rate"), [pytest.param("causal", 0.01, marks=pytest.mark.slow), ("seq2seq", 0.003)]
)
def test_a_run_learns_to_tell_which_captions_match(
    kind: str, rate: float, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """On other images of the same colors, half of them with another's caption."""
    recipe = matching_recipe(
        tiny_recipe, tmp_path, kind, train__steps=120, train__batch_size=8,
        train__learning_rate=rate, evaluate__every=120,
    )  # fmt: skip
    run = sft(recipe)
    metrics = run.result["metrics"]
    assert metrics["exact_match"]["n"] == 16
    assert metrics["exact_match"]["low"] > 0.5
    assert evaluate(run.folder).accuracy == run.result["accuracy"]


def test_a_resumed_run_is_the_run_that_was_never_stopped(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """It draws the same negatives."""
    changes = {"train__log_every": 1, "train__checkpoints": {"every": 2}, "data__validation": []}
    one, two = (
        matching_recipe(tiny_recipe, tmp_path, output=output, **changes, data__test=[])
        for output in ("one", "two")
    )
    sft(one)
    interrupted(lambda show: sft(two, show=show), stage=0, step=2)
    sft(two, resume=True)
    assert_same_bits(tmp_path / "one" / "model", tmp_path / "two" / "model")


def test_a_row_is_a_question_with_two_answers(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    model, rows = model_and_batch(tiny_recipe, tmp_path, "causal", rows=1)
    assert rows[0].question == "Does this caption describe the image? a red picture"
    (example,) = model.processor.examples(rows[0])
    assert example.judged == 1 and len(separate_rows(example)) == 2
