"""Joined rows longer than a decoder's window give what their rows give one by one.

transformers cuts the window there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

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
from vlm_tune.data.packing import pack_layout
from vlm_tune.data.prepare.run import prepare
from vlm_tune.data.types import Example
from vlm_tune.errors import ModelError
from vlm_tune.generation.answering import answer_prompts, prompt_rows
from vlm_tune.model.language.causal import CausalLLM
from vlm_tune.model.language.decoding import Decoding

WINDOW = 12
HALF = "layer_types: [sliding_attention, full_attention]"
DECODERS = {
    "mistral": f"sliding_window: {WINDOW}",
    "phi3": f"sliding_window: {WINDOW}, pad_token_id: 0",
    "starcoder2": f"sliding_window: {WINDOW}",
    "qwen2": f"sliding_window: {WINDOW}, use_sliding_window: true, max_window_layers: 1",
    "smollm3": (
        f"sliding_window: {WINDOW}, use_sliding_window: true, no_rope_layers: [1, 0], {HALF}"
    ),
    "gemma2": f"sliding_window: {WINDOW}, head_dim: 16, query_pre_attn_scalar: 16, {HALF}",
    "gemma3_text": f"sliding_window: {WINDOW}, head_dim: 16, query_pre_attn_scalar: 16, {HALF}",
    "llama4_text": f"attention_chunk_size: {WINDOW}, head_dim: 16, intermediate_size_mlp: 32, "
    "num_local_experts: 2, "
    "layer_types: [chunked_attention, full_attention]",
}


@pytest.fixture
def long_questions(color_rows: Path) -> Path:
    """Two questions about each image, twice as long as the window, that begin alike."""
    rows = [json.loads(line) for line in color_rows.read_text().splitlines()]
    for place, row in enumerate(rows):
        row["messages"][0]["content"] = "look at the whole image first, then say: " + row[
            "messages"
        ][0]["content"] * (place % 3 + 1)
    color_rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return color_rows


def decoder_text(make: Callable[..., str], decoder: str) -> str:
    """The tiny recipe's text with another decoder."""
    return (
        make("causal")
        .replace("model_type: llama", f"model_type: {decoder}")
        .replace("hidden_size: 32,", f"hidden_size: 32, {DECODERS[decoder]},")
    )


def joined_rows(model: Any, recipe: Any, join: str) -> tuple[list[Example], list[Example]]:
    """The recipe's rows, and the same joined."""
    rows = [example for row in rows_of(recipe) for example in model.processor.examples(row)]
    assert min(len(row.input_ids) for row in rows) > 2 * WINDOW
    if join == "packed":
        return rows, [pack_layout(rows[:3], "causal"), pack_layout(rows[3:], "causal")]
    grouped = recipe.data.model_copy(update={"group": "image", "row_length": 512})
    examples = examples_of(prepare(grouped, grouped.train, model.processor, seed=recipe.seed))
    return rows, examples if join == "branches" else [pack_layout(examples, "causal")]


@pytest.mark.parametrize("join", ["branches", "packed", "packed branches"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_losses_and_gradients_equal_rows_one_by_one(
    decoder: str, join: str, long_questions: Path, tiny_recipe: Callable[..., str]
) -> None:
    # PEFT takes Llama 4's router for a plain linear layer.
    tune = (
        LORA_TUNE.replace("all-linear", "[q_proj, o_proj]")
        if decoder == "llama4_text"
        else LORA_TUNE
    )
    recipe = parsed(with_tune(decoder_text(tiny_recipe, decoder), tune))
    model = built(recipe)
    tuned_by(model, recipe)
    wake_adapters(model)
    rows, together = joined_rows(model, recipe, join)
    alone, expected = loss_and_gradients(model, [batch_of(model, [example]) for example in rows])
    joined, gradients = loss_and_gradients(model, [batch_of(model, together)])
    assert any("lora_A" in name for name in gradients)
    assert float(joined) == pytest.approx(float(alone), rel=1e-5)
    assert_close(gradients, expected)
    # Past its window the decoder would see something else.
    setattr(
        model.llm.model.config,
        "attention_chunk_size" if decoder == "llama4_text" else "sliding_window",
        256,
    )
    wider, _ = loss_and_gradients(model, [batch_of(model, together)])
    assert abs(float(wider) - float(alone)) > 1e-3


@pytest.mark.parametrize("how", ["prompt", "prefix"])
@pytest.mark.parametrize("join", ["branches", "packed"])
def test_virtual_tokens_leave_the_window_as_others_do(
    join: str, how: str, long_questions: Path, tiny_recipe: Callable[..., str]
) -> None:
    tune = f"""
tune:
  - {{match: "tower.*", how: frozen}}
  - {{match: "connector.*", how: full}}
  - {{match: "llm.*", how: {how}, tokens: 5}}
train:"""
    recipe = parsed(with_tune(decoder_text(tiny_recipe, "qwen2"), tune))
    model = built(recipe)
    tuned_by(model, recipe)
    assert model.llm.prompt is not None
    with torch.no_grad():
        model.llm.prompt.values.add_(
            torch.randn(model.llm.prompt.values.shape, generator=torch.Generator().manual_seed(3))
            * 0.3
        )
    rows, together = joined_rows(model, recipe, join)
    alone, expected = loss_and_gradients(model, [batch_of(model, [example]) for example in rows])
    joined, gradients = loss_and_gradients(model, [batch_of(model, together)])
    assert float(expected["llm.prompt.values"].abs().max()) > 1e-4
    assert float(joined) == pytest.approx(float(alone), rel=1e-5)
    assert_close(gradients, expected)


@pytest.mark.parametrize("decoder", DECODERS)
def test_answers_of_joined_prompts_are_those_one_by_one(
    decoder: str, long_questions: Path, tiny_recipe: Callable[..., str]
) -> None:
    """transformers generates one by one, with its own cache that drops what left the window."""
    recipe = parsed(decoder_text(tiny_recipe, decoder))
    model = built(recipe).eval()
    for parameter in model.llm.model.parameters():
        parameter.data *= (
            3  # sharper than at initialisation, so that texts depend on image and question
        )
    prompts, decoding, fetch = (
        model.processor.prompts(rows_of(recipe)),
        Decoding(20),
        model.processor.images,
    )
    assert all(tree.row.visible_until is not None for tree in prompt_rows(model, prompts, decoding))
    together = answer_prompts(model, prompts, decoding, fetch=fetch, batch_size=5)
    assert together == [
        answer_prompts(model, [prompt], decoding, fetch=fetch)[0] for prompt in prompts
    ]
    assert len(set(together)) > 2


def test_what_can_not_be_joined_is_refused_in_training_and_read_one_by_one(
    long_questions: Path, tiny_recipe: Callable[..., str]
) -> None:
    """A state that goes from token to token, and distances counted by place.

    An LFM2's convolutions, a BLOOM's ALiBi.
    """
    text = tiny_recipe("causal")
    lfm2 = text.replace(
        "model_type: llama, vocab_size: 400, config: {",
        "model_type: lfm2, vocab_size: 400, config: {layer_types: [conv, full_attention], ",
    )
    head, _, rest = text.partition("model_type: llama")
    bloom = (
        f"{head}model_type: bloom, vocab_size: 400, config: {{hidden_size: 32, n_layer: 2, "
        f"n_head: 2{rest[rest.index('}}') :]}"
    )
    for scratch, reason in ((lfm2, r"carry state .* \(conv\)"), (bloom, "takes no position ids")):
        recipe = parsed(scratch)
        model = built(recipe).eval()
        assert isinstance(model.llm, CausalLLM)
        _, together = joined_rows(model, recipe, "branches")
        with pytest.raises(
            ModelError,
            match=f"can't be joined, .*{reason}.* set data.group: none and data.packing: false",
        ):
            model(batch_of(model, together))
        prompts, fetch = model.processor.prompts(rows_of(recipe)), model.processor.images
        assert all(
            tree.row.visible_until is None for tree in prompt_rows(model, prompts, Decoding(4))
        )
        assert len(answer_prompts(model, prompts, Decoding(4), fetch=fetch)) == len(prompts)
