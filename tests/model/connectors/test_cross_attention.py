"""Gated cross-attention inside the LLM.

What it starts as, which image a token sees, and that every way of running agrees.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.helpers.connector_kinds import Tiny, with_connector
from tests.helpers.tiny_models import (
    assert_close,
    assert_same_outputs,
    batch_of,
    built,
    largest,
    loss_and_gradients,
    parsed,
    rows_of,
    save_llm,
    tuned_by,
    with_llm,
    with_tune,
)
from vlm_tune.config.connectors import CrossAttentionConnector, LinearConnector
from vlm_tune.data.batch import Batch
from vlm_tune.data.packing import branch_layout
from vlm_tune.data.types import Conversation, Example, Message
from vlm_tune.errors import ModelError
from vlm_tune.generation.answering import prompt_answers
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.connectors.cross_attention import Seen
from vlm_tune.model.connectors.registry import build_connector
from vlm_tune.model.language.decoding import Decoding

both_llms = pytest.mark.parametrize("llm", ["causal", "seq2seq"])


def model_of(
    llm: str, tiny_recipe: Tiny, *, open_gates: bool = True, **changes: Any
) -> tuple[VisionLanguageModel, Any]:
    recipe = parsed(with_connector(tiny_recipe(llm), "cross_attention"), **changes)
    model = built(recipe)
    if open_gates:
        for name, parameter in model.connector.named_parameters():
            if name.endswith("gate"):
                parameter.data.fill_(0.7)
    return model.eval(), recipe


def examples_of(model: VisionLanguageModel, recipe: Any) -> list[Example]:
    """Rows with one image, with two, and with none."""
    rows = rows_of(recipe)
    parts = (rows[0].media[0], "then", rows[4].media[0], "what changed?")
    two = Conversation("two", (Message("user", parts), Message("assistant", ("no",))))
    none = Conversation("none", (Message("user", ("what?",)), Message("assistant", ("no",))))
    return [example for row in (*rows[:2], two, none) for example in model.processor.examples(row)]


@both_llms
@torch.no_grad()
def test_it_starts_as_the_text_model(llm: str, tiny_recipe: Tiny) -> None:
    """Of the image only the marker is there; a text without images is as without the blocks."""
    model, recipe = model_of(llm, tiny_recipe, open_gates=False)
    batch = batch_of(model, examples_of(model, recipe))
    embeds = model.embed(batch)
    connector: Any = model.connector
    assert torch.equal(
        embeds[batch.image_mask], connector.marker.expand(len(batch.media_index), -1)
    )
    logits = model.llm.supervised_logits(embeds, batch)
    opened, _ = model_of(llm, tiny_recipe)
    changed = opened.llm.supervised_logits(opened.embed(batch), batch)
    assert largest(logits, changed) > 1e-4
    for layer in model.llm.modules():
        layer._forward_pre_hooks.clear()
    assert_same_outputs(logits, model.llm.supervised_logits(embeds, batch))


@both_llms
@torch.no_grad()
def test_open_gates_show_the_image(llm: str, tiny_recipe: Tiny) -> None:
    model, recipe = model_of(llm, tiny_recipe)
    batch = batch_of(model, examples_of(model, recipe)[:1])
    one = model.llm.supervised_logits(model.embed(batch), batch)
    assert batch.pixels is not None
    batch.pixels = 255 - batch.pixels
    assert largest(one, model.llm.supervised_logits(model.embed(batch), batch)) > 1e-5


def seen_by(batch: Batch, images: Any, tokens: int) -> torch.Tensor:
    connector: Any = build_connector(
        CrossAttentionConnector(
            kind="cross_attention", images=images, heads=1, base=LinearConnector(kind="linear")
        ),
        4,
        4,
    )
    connector.join(
        torch.zeros(*batch.input_ids.shape, 4),
        connector(torch.randn(len(batch.media_index), tokens, 4)),
        batch,
    )
    return connector.seen.value.mask


@given(
    rows=st.lists(
        st.lists(st.tuples(st.booleans(), st.booleans()), min_size=6, max_size=6),
        min_size=1,
        max_size=3,
    ),
    images=st.sampled_from(["last", "all"]),
)
@settings(max_examples=60, deadline=None)
def test_a_token_sees_the_last_images_before_it_in_its_own_sample(
    rows: list[list[tuple[bool, bool]]], images: str
) -> None:
    """Each place: is it an image, and does a new packed sample begin."""
    slots = torch.tensor([[image for image, _ in row] for row in rows])
    assume(bool(slots.any()))
    samples = torch.tensor([[begins for _, begins in row] for row in rows]).long().cumsum(1)
    ids, media = (
        torch.zeros_like(slots, dtype=torch.long),
        torch.zeros(int(slots.sum()), dtype=torch.long),
    )
    batch: Any = Batch(["row"] * len(rows), ids, torch.ones_like(slots), slots, ids, media)
    for packed in (False, True):
        if packed:
            batch.samples = samples
        mask = seen_by(batch, images, tokens=2)
        for r, row in enumerate(slots.tolist()):
            places = [place for place, image in enumerate(row) if image]
            for token in range(len(row)):
                earlier = [k for k, place in enumerate(places) if place <= token]
                if images == "last":
                    earlier = [k for k in earlier if all(row[places[k] : places[earlier[-1]] + 1])]
                wanted = [
                    k for k in earlier if not packed or samples[r, places[k]] == samples[r, token]
                ]
                expected = [number // 2 in wanted for number in range(mask.shape[2])]
                assert mask[r, token].tolist() == expected


@torch.no_grad()
def test_generation_with_a_cache_says_what_the_whole_pass_says(tiny_recipe: Tiny) -> None:
    model, recipe = model_of("causal", tiny_recipe)
    prompts = model.processor.prompts(rows_of(recipe)[:2])
    answers = prompt_answers(model, prompts, Decoding(6), fetch=model.processor.images)
    for prompt, answer in zip(prompts, answers, strict=True):
        generated: list[int] = []
        for token in answer.ids:
            so_far = replace(
                prompt,
                input_ids=np.append(prompt.input_ids, generated).astype(np.int32),
                labels=np.append(np.full(len(prompt.labels) + len(generated) - 1, -100), 0).astype(
                    np.int32
                ),
                image_mask=np.append(prompt.image_mask, [False] * len(generated)),
            )
            batch = batch_of(model, [so_far])
            assert int(model.llm.supervised_logits(model.embed(batch), batch)[0].argmax()) == token
            generated.append(token)
        assert len(generated) >= 2


def test_beams_look_at_the_image_of_their_own_row() -> None:
    seen = Seen(
        torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[[False], [True]], [[False], [False]]])
    )
    media, mask = seen.for_states(6, 1)
    assert media.flatten().tolist() == [1, 1, 1, 2, 2, 2]
    assert mask.flatten().tolist() == [True] * 3 + [False] * 3
    with pytest.raises(
        ModelError, match="3 rows reach the cross-attention blocks, the batch has 2"
    ):
        seen.for_states(3, 1)


def test_branches_are_the_rows_one_by_one(tiny_recipe: Tiny) -> None:
    model, recipe = model_of("causal", tiny_recipe)
    tuned_by(model, recipe)
    rows = [example for row in rows_of(recipe)[:2] for example in model.processor.examples(row)]
    joined = branch_layout(rows, 999)
    assert len(joined) == 1
    loss, gradients = loss_and_gradients(model, [batch_of(model, [row]) for row in rows])
    other_loss, other = loss_and_gradients(model, [batch_of(model, joined)])
    assert float(loss) == pytest.approx(float(other_loss), rel=1e-5)
    assert_close(gradients, other, relative=1e-4)


@both_llms
def test_gradients_with_checkpointing_are_the_same(llm: str, tiny_recipe: Tiny) -> None:
    model, recipe = model_of(llm, tiny_recipe)
    tuned_by(model, recipe)
    batches = [
        batch_of(model, examples_of(model, recipe)[:2]),
        batch_of(model, examples_of(model, recipe)[2:]),
    ]
    model.train()
    loss, gradients = loss_and_gradients(model, batches)
    model.llm.model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    again, checkpointed = loss_and_gradients(model, batches)
    assert float(loss) == pytest.approx(float(again), rel=1e-6)
    assert_close(gradients, checkpointed)


def test_blocks_train_between_quantised_layers(tiny_recipe: Tiny, tmp_path: Path) -> None:
    text = with_connector(tiny_recipe("causal"), "cross_attention")
    folder = save_llm(
        tmp_path / "llama", "causal", rows_of(parsed(text)), hidden_size=64, intermediate_size=64
    )
    recipe = parsed(with_tune(with_llm(text, folder, "causal", ", quantize: nf4")))
    model = built(recipe)
    tuned_by(model, recipe)
    loss: Any = model.train()(batch_of(model, examples_of(model, recipe)))
    loss.sum.backward()
    gates = {
        name: parameter.grad
        for name, parameter in model.connector.named_parameters()
        if name.endswith("gate")
    }
    assert len(gates) == 4
    assert all(grad is not None and grad.abs() > 0 for grad in gates.values())


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "qwen2", "gemma", "phi", "mistral"])
@torch.no_grad()
def test_blocks_go_into_every_decoder(model_type: str, tiny_recipe: Tiny) -> None:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
    if model_type == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2}
    if model_type == "opt":
        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 48,
            "word_embed_proj_dim": 32,
        }
    scratch = {"model_type": model_type, "vocab_size": 400, "config": sizes}
    model, recipe = model_of("causal", tiny_recipe, model__llm__scratch=scratch)
    batch = batch_of(model, examples_of(model, recipe)[:1])
    one: Any = model(batch)
    assert batch.pixels is not None
    batch.pixels = 255 - batch.pixels
    other: Any = model(batch)
    assert abs(float(one.sum) - float(other.sum)) > 1e-6


def test_more_layers_between_blocks_than_the_model_has_are_refused(tiny_recipe: Tiny) -> None:
    with pytest.raises(ModelError, match=r"model\.connector\.every is 3, and the LLM has 2 layers"):
        model_of("causal", tiny_recipe, model__connector__every=3)
