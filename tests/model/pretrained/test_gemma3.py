"""Recipes that start from a Gemma 3: joined, packed, planned, resumed, served, merged, exported."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.family_runs import (
    assert_planned_without_weights,
    assert_resumed_and_merged,
    logits_of,
)
from tests.helpers.gemma_samples import save_gemma3
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
    run,
    tuned_by,
    wake_adapters,
    with_tune,
)
from tests.helpers.vlm_samples import with_pretrained
from tests.model.pretrained.test_idefics3 import OTHER_PATHS, PLAIN, trained
from vlm_tune.data.packing import pack_layout
from vlm_tune.data.prepare.run import prepare
from vlm_tune.data.types import IGNORE_INDEX, Conversation, Example
from vlm_tune.errors import ModelError, RecipeError
from vlm_tune.exporting import export, possible_exports
from vlm_tune.generation.answering import answer_prompts
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.generation.chat_session import _Prefix
from vlm_tune.model.acceleration.install import BOTH_WAYS, running
from vlm_tune.model.language.decoding import Decoding

Tiny = Callable[..., str]


@pytest.fixture
def recipe(tiny_recipe: Tiny, tmp_path: Path) -> str:
    """A recipe over a tiny Gemma 3: LoRA on the LLM, the connector in full."""
    save_gemma3(tmp_path / "vlm")
    return with_tune(with_pretrained(tiny_recipe("causal"), tmp_path / "vlm", "gemma3"), LORA_TUNE)


def tuned(text: str) -> VisionLanguageModel:
    model = built(parsed(text))
    tuned_by(model, parsed(text))
    wake_adapters(model)
    return model


def one_by_one(model: VisionLanguageModel, rows: Sequence[Conversation]) -> list[str]:
    """Greedy answers to rows, each by itself."""
    fetch = model.processor.images
    prompts = model.processor.prompts(rows)
    return [answer_prompts(model, [prompt], Decoding(4), fetch=fetch)[0] for prompt in prompts]


def test_losses_gradients_and_answers_of_branches_and_packed_rows_equal_rows(recipe: str) -> None:
    config = parsed(recipe)
    model = tuned(recipe)
    grouped = config.data.model_copy(update={"group": "image"})
    branches = examples_of(prepare(grouped, grouped.train, model.processor, seed=config.seed))
    assert [(len(example.media), example.questions) for example in branches] == [(1, 2)] * 4
    examples = [example for row in rows_of(config) for example in model.processor.examples(row)]
    alone, expected = loss_and_gradients(model, [batch_of(model, [each]) for each in examples])
    packed = [pack_layout([*branches[:2], examples[4]], "causal"), *branches[3:], examples[5]]
    for joined in (branches, packed):
        together, gradients = loss_and_gradients(model, [batch_of(model, joined)])
        assert float(together) == pytest.approx(float(alone), rel=1e-5)
        assert_close(gradients, expected)
    model.eval()
    rows = rows_of(config)
    prompts = model.processor.prompts(rows)
    answers = answer_prompts(model, prompts, Decoding(4), fetch=model.processor.images)
    assert answers == one_by_one(model, rows)


def test_a_chat_goes_on_after_the_tokens_that_it_has_computed(recipe: str) -> None:
    model = tuned(recipe).eval()
    first, second, *_ = rows_of(parsed(recipe))
    longer = replace(first, messages=(*first.messages, *second.messages))
    prefix = _Prefix()
    for row in (first, longer, second):
        (prompt,) = model.processor.prompts([row])
        pieces = prefix.continued(model, prompt, Decoding(4))
        text = ""
        try:
            while True:
                text += next(pieces)
        except StopIteration as stop:
            text += stop.value.text[len(text) :]
        assert text == one_by_one(model, [row])[0]


@pytest.mark.parametrize("remembered", [False, True])
def test_rows_that_join_and_leave_have_the_states_of_whole_rows(
    recipe: str, remembered: bool
) -> None:
    """Also after a remembered image, before another one."""
    model = tuned(recipe).eval()
    first, second, *_ = rows_of(parsed(recipe))
    both = replace(first, messages=(*first.messages, *second.messages))
    prompts = [model.processor.prompt(row) for row in (both, second)]
    rows = model.llm.rows()
    with torch.inference_mode():
        expected = [last_state(model, prompt) for prompt in prompts]
        batch = batch_of(model, prompts)
        lengths = [len(prompt.input_ids) for prompt in prompts]
        joined = (model.embed(batch), lengths, [None, None], model.llm.blocks(batch))
        states = rows.join(*joined)
        if remembered:
            end = int(prompts[0].image_mask.nonzero()[0][3]) + 1
            rest = replace(
                prompts[0],
                **{
                    name: getattr(prompts[0], name)[end:]
                    for name in ("input_ids", "labels", "image_mask")
                },
                media=prompts[0].media[1:],
            )
            batch = batch_of(model, [rest])
            prefixes = [rows.prefix(0, end)]
            lengths = [len(rest.input_ids)]
            states = rows.join(model.embed(batch), lengths, prefixes, model.llm.blocks(batch))
            expected = expected[:1]
    for state, whole in zip(states, expected, strict=True):
        assert largest(state, whole) <= 1e-5


def last_state(model: VisionLanguageModel, prompt: Example) -> torch.Tensor:
    batch = batch_of(model, [prompt])
    leaves = torch.tensor([[len(prompt.input_ids) - 1]])
    return model.llm.branches(model.embed(batch), batch, leaves, 1).hidden[0, 0]


@pytest.mark.slow
def test_a_run_is_resumed_bit_for_bit_and_merged_without_the_original(
    recipe: str, tmp_path: Path
) -> None:
    assert_resumed_and_merged(recipe, tmp_path)


def test_the_plan_reads_no_weights(recipe: str, tmp_path: Path) -> None:
    assert_planned_without_weights(recipe, tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_what_was_trained_is_written_as_what_it_was(
    tied: bool, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    """Verified by transformers: ids, pixels, logits and text; and it is a start again."""
    save_gemma3(tmp_path / "vlm", tied=tied)
    model = trained("gemma3", tiny_recipe("causal"), tmp_path)
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    exports = possible_exports(parsed(text))
    assert exports["transformers"] is None
    assert "an image has 4 tokens, more than the window of 3" in str(exports["gguf"])
    report = export(tmp_path / "run", tmp_path / "exported", dtype="fp32")
    assert report.difference is not None and report.allowed is not None and report.same_text
    assert report.difference <= report.allowed and report.rows == 4
    written = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert (written["model_type"], written["tie_word_embeddings"]) == ("gemma3", tied)
    again = built(parsed(text.replace(str(tmp_path / "vlm"), str(tmp_path / "exported"))))
    rows = rows_of(parsed(text))
    assert largest(logits_of(again, rows), logits_of(model, rows)) <= 1e-3


def test_the_adapter_has_the_whole_models_names(tiny_recipe: Tiny, tmp_path: Path) -> None:
    """Plain PEFT over the checkpoint answers as the model; the projector is one module."""
    save_gemma3(tmp_path / "vlm")
    trained("gemma3", tiny_recipe("causal"), tmp_path)
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    assert possible_exports(parsed(text))["adapter"] is None
    report = export(tmp_path / "run", tmp_path / "adapter", format="adapter")
    assert report.difference is not None and report.allowed is not None and report.same_text
    assert report.difference <= report.allowed and report.rows == 4
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.multi_modal_projector"]
    assert len(config["target_modules"]) == 2 * 7
    assert all(name.startswith("model.language_model.") for name in config["target_modules"])
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    projector = "base_model.model.model.multi_modal_projector."
    assert f"{projector}mm_input_projection_weight" in tensors
    assert f"{projector}mm_soft_emb_norm.weight" in tensors


@pytest.mark.slow
def test_what_was_trained_opens_in_a_process_without_vlm_tune(
    tiny_recipe: Tiny, tmp_path: Path
) -> None:
    save_gemma3(tmp_path / "vlm")
    model = trained("gemma3", tiny_recipe("causal"), tmp_path)
    export(tmp_path / "run", tmp_path / "exported", dtype="fp32")
    rows = rows_of(parsed(tiny_recipe("causal")))[:3]
    written = [
        {
            "image": str(row.media[0].source),
            "question": row.messages[0].text,
            "answer": row.messages[1].text,
        }
        for row in rows
    ]
    (tmp_path / "rows.json").write_text(json.dumps(written))
    folder = tmp_path / "exported"
    run([sys.executable, "-c", PLAIN, str(folder)], cwd=tmp_path, PYTHONPATH=OTHER_PATHS)
    names, logits = json.loads((folder / "logits.json").read_text())
    assert names == ["Gemma3ForConditionalGeneration", "Gemma3Processor"]
    for row, theirs in zip(rows, logits, strict=True):
        batch = batch_of(model, model.processor.examples(row))
        with torch.no_grad():
            ours = model.llm.supervised_logits(model.embed(batch), batch)
        other = torch.tensor(theirs)[(batch.labels[0] != IGNORE_INDEX).nonzero()[:, 0]]
        assert largest(ours, other) <= 1e-5 * max(1.0, float(ours.abs().max()))


def test_attention_that_can_not_be_quick_says_why(recipe: str) -> None:
    model = built(parsed(recipe))
    assert BOTH_WAYS in str(running(model.llm, torch.float32))
    for device in ("cpu", "cuda"):
        report = running(model.llm, torch.bfloat16, torch.device(device))
        assert BOTH_WAYS in str(report), device
    flex = recipe.replace("pretrained:", "llm: {attention: flex}, pretrained:")
    with pytest.raises(ModelError, match="attend to each other in both directions"):
        built(parsed(flex))


def test_an_encoder_has_no_such_tokens(tiny_recipe: Tiny) -> None:
    text = tiny_recipe("seq2seq").replace(
        "llm: {kind: seq2seq", "llm: {bidirectional: images, kind: seq2seq"
    )
    with pytest.raises(RecipeError, match="bidirectional is for decoders"):
        parsed(text)
