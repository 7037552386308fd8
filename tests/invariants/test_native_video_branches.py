"""Joined rows of native models with videos give what their rows give alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers.native_models import JOINED, Kind
from tests.helpers.native_videos import video_recipe
from tests.helpers.tiny_models import (
    LORA_TUNE,
    assert_close,
    batch_of,
    built,
    examples_of,
    loss_and_gradients,
    parsed,
    rows_of,
    tuned_by,
    wake_adapters,
    with_tune,
)
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.images.decode import PixelCache
from vlm_tune.data.packing import pack_layout
from vlm_tune.data.prepare.run import prepare
from vlm_tune.data.types import Conversation, Example, Media, Video
from vlm_tune.generation.answering import answer_prompts, prompt_rows
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.language.decoding import Decoding


@pytest.fixture(scope="module", params=JOINED)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture(scope="module")
def recipe(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A recipe on a tiny model, with one to three questions about each of some videos."""
    return parsed(with_tune(video_recipe(tmp_path_factory.mktemp(kind), kind), LORA_TUNE))


@pytest.fixture(scope="module")
def model(recipe: Recipe) -> VisionLanguageModel:
    """The recipe's model with adapters that change it."""
    model = built(recipe)
    tuned_by(model, recipe)
    wake_adapters(model)
    return model


def alone(model: VisionLanguageModel, recipe: Recipe) -> list[Example]:
    return [model.processor.examples(row)[0] for row in rows_of(recipe)]


def joined(model: VisionLanguageModel, recipe: Recipe) -> list[Example]:
    """The recipe's rows, one example for the rows of the same media."""
    grouped = recipe.data.model_copy(update={"group": "image"})
    examples = examples_of(prepare(grouped, grouped.train, model.processor, seed=recipe.seed))
    assert sorted(example.questions for example in examples) == [1, 1, 1, 2, 3]
    return examples


def packed(model: VisionLanguageModel, recipe: Recipe) -> list[Example]:
    """Rows and branches together in two rows."""
    rows = alone(model, recipe)
    branches = [example for example in joined(model, recipe) if example.questions > 1]
    return [
        pack_layout([rows[7], *branches], "causal"),
        pack_layout([rows[5], rows[6]], "causal"),
    ]


@pytest.mark.parametrize("join", [joined, packed])
def test_losses_and_gradients_are_those_of_rows_one_by_one(
    model: VisionLanguageModel, recipe: Recipe, join: Callable[..., list[Example]]
) -> None:
    rows = alone(model, recipe)
    expected_loss, expected = loss_and_gradients(model, [batch_of(model, [row]) for row in rows])
    loss, gradients = loss_and_gradients(model, [batch_of(model, join(model, recipe))])
    assert any("visual" in name for name in gradients)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    assert_close(gradients, expected)


def test_positions_of_rows_are_transformers(model: VisionLanguageModel, recipe: Recipe) -> None:
    rows = alone(model, recipe)
    llm: Any = model.llm
    axes = llm.inputs(batch_of(model, [pack_layout(rows, "causal")]))["position_ids"]
    start = 0
    for row in rows:
        given = llm.inputs(batch_of(model, [row]))
        expected = torch.arange(len(row.input_ids)).expand(3, 1, -1)
        if row.media:
            expected, _ = llm.body.get_rope_index(**given)
        assert torch.equal(axes[:, :, start : start + len(row.input_ids)], expected)
        start += len(row.input_ids)


def _sparse(row: Conversation) -> Conversation:
    """The row with frames that are a minute apart."""

    def sparse(part: str | Media) -> str | Media:
        if isinstance(part, str) or not isinstance(part.source, Video):
            return part
        video = part.source
        places = tuple(240 * number for number in range(len(video.frames)))
        return replace(part, source=replace(video, places=places, count=places[-1] + 1))

    messages = (replace(turn, parts=tuple(map(sparse, turn.parts))) for turn in row.messages)
    return replace(row, messages=tuple(messages))


@pytest.mark.parametrize("minutes", [False, True], ids=["seconds", "minutes"])
def test_answers_of_prompts_that_share_videos_are_those_one_by_one(
    model: VisionLanguageModel, recipe: Recipe, minutes: bool
) -> None:
    """Also where the times of a video outreach the positions of the text behind it."""
    rows = [_sparse(row) if minutes else row for row in rows_of(recipe)]
    prompts = model.processor.prompts(rows)
    fetch = PixelCache(model.processor.images)
    decoding = Decoding(10)
    shared = sorted(len(tree.members) for tree in prompt_rows(model, prompts, decoding))
    assert shared == [1, 1, 1, 2, 3]
    with model.evaluating():
        together = answer_prompts(model, prompts, decoding, fetch=fetch)
        # By transformers' own loop.
        alone = [_generated(model, prompt, fetch) for prompt in prompts]
    assert together == alone
    assert len(set(together)) > 3


def _generated(model: VisionLanguageModel, prompt: Example, fetch: PixelCache) -> str:
    batch = batch_of(model, [prompt])
    llm: Any = model.llm
    length = batch.input_ids.shape[1]
    ids = llm.model.generate(
        **llm.inputs(batch),
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=model.processor.stop_ids,
    )
    return model.processor.decode(ids[0, length:].tolist())
