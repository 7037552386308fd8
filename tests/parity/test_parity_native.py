"""Native models, called as they are: inputs, logits, gradients and text are transformers' own."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.helpers.native_models import KINDS, save_native, with_native
from tests.helpers.tiny_models import batch_of, built, largest, parsed, rows_of
from tests.helpers.tiny_recipes import tiny_text
from tests.helpers.transformers_parity import (
    BY_LORA,
    assert_same_logits,
    by_chat_template,
    peft_over,
    same_gradients,
    their_logits,
    their_step,
    trained_step,
    with_adapters,
    write_rows,
)
from vlm_tune.data.batch import Batch
from vlm_tune.data.images.decode import PixelCache
from vlm_tune.data.types import IGNORE_INDEX, Conversation
from vlm_tune.errors import ModelError
from vlm_tune.generation.answering import answer_prompts
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.lora import is_adapter, merge_adapter


@lru_cache(maxsize=2)
def processor_of(folder: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def their_inputs(folder: Path, row: Conversation, *, prompt: bool = False) -> Any:
    """What the checkpoint's own processor makes of a row."""
    return by_chat_template(processor_of(folder), row, prompt=prompt)


class Taken(NamedTuple):
    """The model of a recipe, transformers' own in the folder `vlm`, and the rows."""

    model: VisionLanguageModel
    theirs: Any
    rows: list[Conversation]
    folder: Path
    recipe: str

    @property
    def batch(self) -> Batch:
        """All rows: of one image, of several, and of words alone."""
        examples = [self.model.processor.examples(row)[0] for row in self.rows]
        return batch_of(self.model, examples)


def take(kind: str, folder: Path, *, tied: bool = False) -> Taken:
    """A tiny native model, called by a recipe."""
    write_rows(folder / "rows.jsonl")
    theirs = save_native(folder / "vlm", kind, tied=tied)
    text = tiny_text("causal", folder / "rows.jsonl", folder / "run")
    text = with_native(text.replace("max_length: 128", "max_length: 512"), folder / "vlm")
    recipe = parsed(text)
    return Taken(built(recipe).eval(), theirs, rows_of(recipe), folder / "vlm", text)


@pytest.fixture(scope="module", params=KINDS)
def taken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Taken:
    return take(request.param, tmp_path_factory.mktemp(request.param))


def our_name(name: str) -> str:
    return f"llm.model.{name.replace('.base_layer.', '.')}"


def assert_step_is_theirs(taken: Taken, model: VisionLanguageModel, theirs: Any) -> None:
    """Asserts that logits and gradients of all rows in one batch are transformers'."""
    batch = taken.batch
    logits = model.llm.supervised_logits(model.embed(batch), batch)
    theirs.zero_grad(set_to_none=True)
    expected = their_logits(theirs, batch, [their_inputs(taken.folder, row) for row in taken.rows])
    assert_same_logits(logits.detach(), expected.detach())
    loss = torch.nn.functional.cross_entropy(expected, batch.labels[batch.labels != IGNORE_INDEX])
    wanted = their_step(theirs, loss, our_name)
    same_gradients(trained_step(model, batch), wanted)


def test_ids_pixels_logits_and_gradients_are_transformers(taken: Taken) -> None:
    model = taken.model
    examples = [model.processor.examples(row)[0] for row in taken.rows]
    inputs = [their_inputs(taken.folder, row) for row in taken.rows]
    assert [len(example.media) for example in examples] == [1, 2, 1, 0]
    for example, given in zip(examples, inputs, strict=True):
        ids = example.input_ids.tolist()
        assert given["input_ids"][0, : len(ids)].tolist() == ids
        native = batch_of(model, [example]).native
        assert native.keys() == {key for key in given if key in native}
        assert all(torch.equal(native[key], given[key]) for key in native)
        assert bool(native) == bool(example.media)
    model.requires_grad_(True)
    assert_step_is_theirs(taken, model, taken.theirs)


def test_a_lora_step_is_that_of_peft_over_transformers(taken: Taken) -> None:
    """On tower and LLM, with the connector in full."""
    tuned = with_adapters(taken.model, taken.recipe)
    batch = taken.batch
    with torch.no_grad():
        before, after = (
            model.llm.supervised_logits(model.embed(batch), batch) for model in (taken.model, tuned)
        )
    assert largest(before, after) > 1e-3
    assert_step_is_theirs(taken, tuned, peft_over(taken.theirs, tuned, our_name))


def assert_merged_is_the_same(tuned: VisionLanguageModel, batch: Batch) -> None:
    """Asserts that a model computes the same with its adapter merged, which this does."""
    with torch.no_grad():
        expected = tuned.llm.supervised_logits(tuned.embed(batch), batch)
        merge_adapter(tuned, "llm")
        merged = tuned.llm.supervised_logits(tuned.embed(batch), batch)
    assert largest(merged, expected) <= 1e-4


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "lfm2_vl", "gemma4", "mistral3"])
def test_lora_on_the_connector_is_a_part_of_the_adapter(kind: str, tmp_path: Path) -> None:
    """Mergers inside of a tower, and projectors beside it; it is merged with the others."""
    taken = take(kind, tmp_path)
    tuned = with_adapters(taken.model, taken.recipe, connector=BY_LORA)
    names = [name.removeprefix("llm.model.") for name, _ in tuned.named_parameters()]
    assert {tuned.llm.part_of(name) for name in names if is_adapter(name)} == {
        "tower", "connector", "llm"
    }  # fmt: skip
    assert_step_is_theirs(taken, tuned, peft_over(taken.theirs, tuned, our_name))
    assert_merged_is_the_same(tuned, taken.batch)


def test_a_connector_without_a_linear_layer_takes_no_lora(tmp_path: Path) -> None:
    taken = take("ovis2", tmp_path)
    with pytest.raises(ModelError, match=r"'connector\.\*' matches no linear layer"):
        with_adapters(taken.model, taken.recipe, connector=BY_LORA)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "lfm2_vl"])
def test_lora_on_embedding_and_head_is_pefts_and_is_merged(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    """A head that is the embedding is one no more when each of them has its own adapter."""
    taken = take(kind, tmp_path, tied=tied)
    language: Any = taken.model.llm.model
    embedding = language.get_input_embeddings()
    assert (embedding.weight is language.get_output_embeddings().weight) == tied
    tuned = with_adapters(taken.model, taken.recipe, "[embed_tokens, lm_head, q_proj]")
    assert_step_is_theirs(taken, tuned, peft_over(taken.theirs, tuned, our_name))
    assert_merged_is_the_same(tuned, taken.batch)


def test_another_image_changes_the_logits(taken: Taken) -> None:
    model, rows = taken.model, taken.rows
    batch = batch_of(model, [model.processor.examples(rows[0])[0]])
    with torch.no_grad():
        before = model.llm.supervised_logits(model.embed(batch), batch)
        batch.native["pixel_values"] = -batch.native["pixel_values"].flip(0, -1)
        after = model.llm.supervised_logits(model.embed(batch), batch)
    assert largest(before, after) > 1e-3


def test_greedy_text_is_transformers(taken: Taken) -> None:
    model, theirs, rows, folder = taken[:4]
    texts = answer_prompts(
        model,
        model.processor.prompts(rows),
        Decoding(8),
        fetch=PixelCache(model.processor.images),
    )
    for row, text in zip(rows, texts, strict=True):
        given = their_inputs(folder, row, prompt=True)
        ids = theirs.generate(
            **given, max_new_tokens=8, do_sample=False, eos_token_id=model.processor.stop_ids
        )
        expected = model.processor.decode(ids[0, given["input_ids"].shape[1] :].tolist())
        assert text == expected


@pytest.mark.parametrize("taken", ["qwen3_vl"], indirect=True)
def test_beams_of_several_images_are_refused_where_transformers_mixes_them_up(
    taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = taken.model, taken.rows
    one_image, two_images = model.processor.prompts(rows[:2])
    cache = PixelCache(model.processor.images)
    beams = Decoding(2, num_beams=2)
    assert len(answer_prompts(model, [one_image, two_images], beams, fetch=cache)) == 2
    monkeypatch.setattr("vlm_tune.model.language.native.beams_keep_images", lambda _: False)
    answer_prompts(model, [one_image], beams, fetch=cache)
    with pytest.raises(ModelError, match="mixes up the images of a row in a beam search"):
        answer_prompts(model, [two_images], beams, fetch=cache)
