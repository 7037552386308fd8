"""Recipes that start from a BLIP-2 or InstructBLIP: branches, packed rows, plans, resumed runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.family_runs import assert_planned_without_weights, assert_resumed_and_merged
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
from tests.helpers.vlm_samples import Blip, save_blip, with_pretrained
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.packing import pack_layout
from vlm_tune.data.prepare.run import prepare
from vlm_tune.errors import DataError, RecipeError
from vlm_tune.generation.answering import answer_prompts
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.language.decoding import Decoding

Tiny = Callable[..., str]
Over = Callable[[Blip], str]


@pytest.fixture
def over(tiny_recipe: Tiny, tmp_path: Path) -> Over:
    """A LoRA recipe over a tiny BLIP-2 with OPT, or InstructBLIP with a Llama, in `vlm`."""

    def text(kind: Blip) -> str:
        plain = tiny_recipe("causal")
        language, template = ("opt", "blip2_opt") if kind == "blip-2" else ("llama", "instructblip")
        save_blip(tmp_path / "vlm", rows_of(parsed(plain)), kind, language)  # type: ignore[arg-type]
        return with_tune(with_pretrained(plain, tmp_path / "vlm", template), LORA_TUNE)

    return text


def same_gradients(actual: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Asserts equal gradients, but for biases of keys, whose gradients are rounding errors."""
    moved = [name for name in wanted if not name.endswith("key.bias")]
    assert actual.keys() == wanted.keys()
    assert_close({name: actual[name] for name in moved}, {name: wanted[name] for name in moved})


def tuned(recipe: Recipe) -> VisionLanguageModel:
    model = built(recipe)
    tuned_by(model, recipe)
    wake_adapters(model)
    return model


def test_losses_gradients_and_answers_of_blip_2s_branches_equal_rows(over: Over) -> None:
    """Questions share the image and the start token, at OPT's learned positions."""
    recipe = parsed(over("blip-2"))
    model = tuned(recipe)
    grouped = recipe.data.model_copy(update={"group": "image"})
    branches = examples_of(prepare(grouped, grouped.train, model.processor, seed=recipe.seed))
    assert [example.questions for example in branches] == [2] * 4
    rows = [example for row in rows_of(recipe) for example in model.processor.examples(row)]
    alone, expected = loss_and_gradients(model, [batch_of(model, [example]) for example in rows])
    packed = [pack_layout(branches[:2], "causal"), pack_layout(branches[2:], "causal")]
    for joined in (branches, packed):
        together, gradients = loss_and_gradients(model, [batch_of(model, joined)])
        assert float(together) == pytest.approx(float(alone), rel=1e-5)
        same_gradients(gradients, expected)
    model.eval()
    prompts = model.processor.prompts(rows_of(recipe))
    fetch = model.processor.images
    one_by_one = [
        answer_prompts(model, [prompt], Decoding(4), fetch=fetch)[0] for prompt in prompts
    ]
    assert answer_prompts(model, prompts, Decoding(4), fetch=fetch) == one_by_one


def test_instructblips_questions_share_no_image(over: Over) -> None:
    """Its Q-Former reads the question with the image; rows are packed."""
    text = over("instructblip")
    with pytest.raises(RecipeError, match="text-conditioned"):
        built(parsed(text, data__group="image"))
    recipe = parsed(text)
    model = tuned(recipe)
    rows = [example for row in rows_of(recipe) for example in model.processor.examples(row)]
    alone, expected = loss_and_gradients(model, [batch_of(model, [example]) for example in rows])
    together, gradients = loss_and_gradients(
        model, [batch_of(model, [pack_layout(rows, "causal")])]
    )
    assert float(together) == pytest.approx(float(alone), rel=1e-5)
    same_gradients(gradients, expected)


@pytest.mark.parametrize("kind", ["blip-2", "instructblip"])
def test_the_plan_reads_no_weights(kind: Blip, over: Over, tmp_path: Path) -> None:
    assert_planned_without_weights(over(kind), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blip-2", "instructblip"])
def test_a_run_is_resumed_bit_for_bit_and_merged_without_the_original(
    kind: Blip, over: Over, tmp_path: Path
) -> None:
    assert_resumed_and_merged(over(kind), tmp_path)


def test_a_tokenizer_without_a_token_for_a_lines_end_is_no_blip_2s(
    over: Over, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    text = over("blip-2")
    file = tmp_path / "vlm" / "tokenizer.json"
    described = Tokenizer.from_file(str(file)).to_str()
    file.write_text(described.replace('"ByteLevel"', '"Whitespace"', 1))
    with pytest.raises(DataError, match=r"ends an answer with '\\n', which is no single token"):
        built(parsed(text))
