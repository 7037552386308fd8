"""Joined rows of native models with positions on three axes give what their rows give alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers.native_models import (
    JOINED,
    Kind,
    native_model,
    save_native,
    with_native,
    write_questions,
)
from tests.helpers.tiny_models import (
    LORA_TUNE,
    assert_close,
    batch_of,
    built,
    examples_of,
    largest,
    loss_and_gradients,
    parsed,
    rows_of,
    tuned_by,
    wake_adapters,
    with_tune,
)
from tests.helpers.tiny_recipes import tiny_text
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.images.decode import PixelCache
from vlm_tune.data.packing import pack_layout
from vlm_tune.data.prepare.run import prepare
from vlm_tune.data.types import Example
from vlm_tune.errors import ModelError
from vlm_tune.generation.answering import answer_prompts, prompt_rows
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.generation.choices import answered, choice_logprobs
from vlm_tune.model.language import attention, native
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.language.image_axes import Shown, image_axes


@pytest.fixture(scope="module", params=JOINED)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture(scope="module")
def recipe(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A recipe on a tiny model, with one to three questions about each of some odd images."""
    folder = tmp_path_factory.mktemp(kind)
    write_questions(folder / "rows.jsonl")
    save_native(folder / "vlm", kind)
    text = tiny_text("causal", folder / "rows.jsonl", folder / "run")
    return parsed(with_tune(with_native(text, folder / "vlm"), LORA_TUNE))


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
    """The recipe's rows, one example for the rows of the same images."""
    grouped = recipe.data.model_copy(update={"group": "image"})
    examples = examples_of(prepare(grouped, grouped.train, model.processor, seed=recipe.seed))
    assert sorted(example.questions for example in examples) == [1, 1, 2, 3]
    return examples


def packed(model: VisionLanguageModel, recipe: Recipe) -> list[Example]:
    """Rows and branches together in two rows."""
    rows = alone(model, recipe)
    branches = [example for example in joined(model, recipe) if example.questions == 3]
    return [
        pack_layout([rows[6], *branches, rows[5]], "causal"),
        pack_layout([rows[3], rows[4]], "causal"),
    ]


@pytest.mark.parametrize("join", [joined, packed])
def test_losses_and_gradients_are_those_of_rows_one_by_one(
    model: VisionLanguageModel, recipe: Recipe, join: Callable[..., list[Example]]
) -> None:
    rows = alone(model, recipe)
    expected_loss, expected = loss_and_gradients(model, [batch_of(model, [row]) for row in rows])
    loss, gradients = loss_and_gradients(model, [batch_of(model, join(model, recipe))])
    assert any("lora_A" in name for name in gradients)
    assert any("visual" in name for name in gradients)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    assert_close(gradients, expected)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"], indirect=True, scope="module")
@torch.no_grad()
def test_layers_with_windows_get_masks_of_their_own(
    model: VisionLanguageModel, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    language: Any = model.llm.model
    decoder = language.get_decoder()
    rows = alone(model, recipe)
    whole: Any = model(batch_of(model, rows))
    monkeypatch.setattr(decoder, "has_sliding_layers", True)
    for config in (decoder.config, language.config.get_text_config()):
        monkeypatch.setattr(config, "layer_types", ["sliding_attention", "full_attention"])
        monkeypatch.setattr(config, "sliding_window", 5)
    expected: Any = model(batch_of(model, rows))
    together: Any = model(batch_of(model, joined(model, recipe)))
    assert float(together.sum) == pytest.approx(float(expected.sum), rel=1e-5)
    assert abs(float(expected.sum) - float(whole.sum)) > 1e-2


def test_branches_behind_the_number_of_tokens_would_be_other_ones(
    model: VisionLanguageModel, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text after images goes on behind their longer sides, not behind all of their tokens."""
    batch = batch_of(model, joined(model, recipe))

    def behind_all(shown: Any, visible_until: Any, positions: Any) -> torch.Tensor:
        axes = image_axes(shown, visible_until, positions)
        return torch.where(shown[0].slots, axes, positions)

    with torch.no_grad():
        right = model.llm.supervised_logits(model.embed(batch), batch)
        monkeypatch.setattr(native, "image_axes", behind_all)
        wrong = model.llm.supervised_logits(model.embed(batch), batch)
    assert largest(right, wrong) > 1e-2


def test_another_image_changes_the_logits_of_its_branches_alone(
    model: VisionLanguageModel, recipe: Recipe
) -> None:
    examples = joined(model, recipe)
    batch = batch_of(model, examples)
    with torch.no_grad():
        before = model.llm.supervised_logits(model.embed(batch), batch)
        first = int(batch.native["image_grid_thw"][0].prod())
        batch.native["pixel_values"][:first] *= -1
        after = model.llm.supervised_logits(model.embed(batch), batch)
    moved = (before - after).abs().amax(1)
    shown = examples[0].supervised
    assert len(examples[0].media) == 1
    assert float(moved[:shown].min()) > 1e-3
    assert float(moved[shown:].max()) < 1e-5


def test_positions_of_rows_are_transformers(model: VisionLanguageModel, recipe: Recipe) -> None:
    """Those of a joined row are its samples' own, each as transformers gives it for that alone."""
    rows = alone(model, recipe)
    batch = batch_of(model, [pack_layout(rows, "causal")])
    llm: Any = model.llm
    axes = llm.inputs(batch)["position_ids"]
    assert axes.shape == (3, 1, sum(len(row.input_ids) for row in rows))
    start = 0
    for row in rows:
        single = batch_of(model, [row])
        length = single.input_ids.shape[1]
        expected = torch.arange(length).expand(3, 1, -1)
        if single.native:
            given = llm.inputs(single)
            expected, _ = llm.body.get_rope_index(
                given["input_ids"],
                mm_token_type_ids=given["mm_token_type_ids"],
                image_grid_thw=given["image_grid_thw"],
            )
        assert torch.equal(axes[:, :, start : start + length], expected)
        start += length


def test_answers_of_prompts_that_share_images_are_those_one_by_one(
    model: VisionLanguageModel, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a cache that grows, and with one of fixed size, which GPUs have."""
    prompts = model.processor.prompts(rows_of(recipe))
    fetch = PixelCache(model.processor.images)
    decoding = Decoding(10)
    shared = sorted(len(tree.members) for tree in prompt_rows(model, prompts, decoding))
    assert shared == [1, 1, 2, 3]
    with model.evaluating():
        together = answer_prompts(model, prompts, decoding, fetch=fetch)
        alone = [answer_prompts(model, [each], decoding, fetch=fetch)[0] for each in prompts]
        monkeypatch.setattr(attention, "takes_static_cache", lambda model, device: True)
        of_fixed_size = answer_prompts(model, prompts, decoding, fetch=fetch)
    assert together == alone == of_fixed_size
    assert len(set(together)) > 3


@torch.no_grad()
def test_choices_are_branches_of_their_questions(
    model: VisionLanguageModel, recipe: Recipe
) -> None:
    texts = ["no", "a wide image"]
    rows = rows_of(recipe)
    questions = [replace(row, messages=row.messages[:-1]) for row in rows]
    logprobs = choice_logprobs(
        model, questions, [texts] * len(rows), fetch=PixelCache(model.processor.images)
    )
    for question, of_question in zip(questions, logprobs, strict=True):
        for example, of_tokens in zip(answered(model, question, texts), of_question, strict=True):
            loss: Any = model(batch_of(model, [example]))
            assert sum(of_tokens) == pytest.approx(-float(loss.sum), rel=1e-5)


def test_rows_with_other_images_than_their_tokens_are_refused() -> None:
    shown = torch.tensor([[False, True, True, False]])
    positions = torch.arange(4)[None]
    with pytest.raises(ModelError, match="2 image tokens in the rows, and their images have 6"):
        images = Shown(shown, torch.tensor([[1, 2, 3]]))
        image_axes([images], torch.full((1, 4), 4), positions)


def test_models_that_carry_a_state_refuse_joined_rows() -> None:
    llm = native.NativeLLM(native_model("lfm2_vl"))
    assert llm.unjoined is not None and "carry state" in llm.unjoined
    with pytest.raises(ModelError, match=r"set data\.group: none and data\.packing: false"):
        llm.check_joined()
