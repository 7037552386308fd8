"""Recipes that start from a PaliGemma: shared prompts, packed, planned, resumed, exported."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from tests.helpers.family_runs import (
    assert_planned_without_weights,
    assert_resumed_and_merged,
    logits_of,
)
from tests.helpers.gemma_samples import save_paligemma
from tests.helpers.tiny_models import (
    LORA_TUNE,
    assert_close,
    batch_of,
    built,
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
from tests.model.pretrained.test_gemma3 import last_state, one_by_one
from tests.model.pretrained.test_idefics3 import OTHER_PATHS, PLAIN, trained
from vlm_tune.compat import omitted_cap
from vlm_tune.data.packing import group_layout, pack_layout
from vlm_tune.data.types import IGNORE_INDEX, Conversation, Example, Message
from vlm_tune.errors import DataError, ModelError, RecipeError
from vlm_tune.exporting import export, possible_exports
from vlm_tune.exporting.merge import merge
from vlm_tune.generation.answering import answer_prompts, prompt_rows, shares_prefix
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.generation.choices import ROW, choice_rows
from vlm_tune.model.acceleration.install import BOTH_WAYS, running
from vlm_tune.model.checkpoint import load_model
from vlm_tune.model.language.decoding import Decoding

Tiny = Callable[..., str]


@pytest.fixture(params=["gemma", "gemma2"])
def recipe(request: pytest.FixtureRequest, tiny_recipe: Tiny, tmp_path: Path) -> str:
    """A recipe over a tiny PaliGemma: LoRA on the LLM, the connector in full."""
    save_paligemma(tmp_path / "vlm", request.param)
    text = with_pretrained(tiny_recipe("causal"), tmp_path / "vlm", "paligemma")
    return with_tune(text, LORA_TUNE)


def tuned(text: str) -> VisionLanguageModel:
    model = built(parsed(text))
    tuned_by(model, parsed(text))
    wake_adapters(model)
    return model


def answered(row: Conversation, answer: str) -> Conversation:
    return replace(row, messages=(*row.messages[:-1], Message("assistant", (answer,))))


def test_answers_of_one_question_and_packed_rows_equal_rows(recipe: str) -> None:
    model = tuned(recipe)
    first, second, *_ = rows_of(parsed(recipe))
    rows = [first, *(answered(first, text) for text in ("", "a longer answer")), second]
    examples = [model.processor.examples(row)[0] for row in rows]
    alone, expected = loss_and_gradients(model, [batch_of(model, [each]) for each in examples])
    tree = replace(group_layout(examples[:3], "causal"), questions=3, answers=None)
    assert len(tree.input_ids) < sum(len(each.input_ids) for each in examples[:3])
    joined = [tree, examples[3]]
    # After an answer of one token the next prompt begins right behind another's.
    packed = [pack_layout([examples[1], tree_of(examples), examples[3]], "causal")]
    for batch in (joined, packed):
        together, gradients = loss_and_gradients(model, [batch_of(model, batch)])
        assert float(together) == pytest.approx(float(alone), rel=1e-5)
        assert_close(gradients, expected)


def tree_of(examples: list[Example]) -> Example:
    """The first and the third example, answers to one question, as a tree."""
    row = group_layout([examples[0], examples[2]], "causal")
    return replace(row, questions=2, answers=None)


def test_only_equal_prompts_share_their_prefill(recipe: str) -> None:
    model = tuned(recipe).eval()
    rows = rows_of(parsed(recipe))
    # The same question twice, and another one about the same image.
    questions = [rows[0], rows[1], rows[0], rows[2]]
    assert rows[0].media == rows[1].media
    prompts = model.processor.prompts(questions)
    trees = prompt_rows(model, prompts, Decoding(4))
    assert sorted(sorted(tree.members) for tree in trees) == [[0, 2], [1], [3]]
    answers = answer_prompts(model, prompts, Decoding(4), fetch=model.processor.images)
    assert answers == one_by_one(model, questions)
    assert not shares_prefix(model, Decoding(4))
    choices = [answered(row, text) for row in rows[:2] for text in ("yes", "no")]
    examples = [model.processor.examples(row)[0] for row in choices]
    trees = choice_rows(model, examples, [2, 2], ROW)
    assert sorted(sorted(tree.members) for tree in trees) == [[0, 1], [2, 3]]


def test_rows_that_join_and_leave_have_the_states_of_whole_rows(recipe: str) -> None:
    model = tuned(recipe).eval()
    prompts = [model.processor.prompt(row) for row in rows_of(parsed(recipe))[:3]]
    rows = model.llm.rows()
    with torch.inference_mode():
        expected = [last_state(model, prompt) for prompt in prompts]
        batch = batch_of(model, prompts)
        lengths = [len(prompt.input_ids) for prompt in prompts]
        states = rows.join(model.embed(batch), lengths, [None] * 3, model.llm.blocks(batch))
    for state, whole in zip(states, expected, strict=True):
        assert largest(state, whole) <= 1e-5


def test_questions_of_an_image_are_no_branches(recipe: str) -> None:
    with pytest.raises(RecipeError, match="questions share no prefix"):
        built(parsed(recipe, data__group="image"))


def test_a_row_has_one_question(recipe: str) -> None:
    model = built(parsed(recipe))
    first, second, *_ = rows_of(parsed(recipe))
    longer = replace(first, messages=(*first.messages, *second.messages))
    with pytest.raises(DataError, match="one question and its answer"):
        model.processor.examples(longer)
    with pytest.raises(ModelError, match="takes later questions"):
        built(parsed(recipe.replace("template: paligemma", "template: vicuna")))


def test_the_images_stand_first(recipe: str) -> None:
    processor = built(parsed(recipe)).processor
    (row, *_) = rows_of(parsed(recipe))
    image = row.media[0]
    question = Message("user", ("What is ", image, "here?"))
    prompt = processor.prompt(Conversation("", (Message("system", ("Look.",)), question)))
    slots = prompt.image_mask.nonzero()[0]
    decode = processor.tokenizer.decode
    assert decode(prompt.input_ids[: slots[0]].tolist()) == "Look.\n"
    assert decode(prompt.input_ids[slots[-1] + 1 :].tolist()) == "<s>What is here?\n"


def test_the_plan_reads_no_weights(recipe: str, tmp_path: Path) -> None:
    assert_planned_without_weights(recipe, tmp_path)


def test_what_was_trained_is_written_as_what_it_was(recipe: str, tmp_path: Path) -> None:
    """Merged and verified by transformers: ids, pixels, logits, text; and it is a start again."""
    model = trained("paligemma", recipe, tmp_path)
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    exports = possible_exports(parsed(text))
    assert exports["transformers"] is None
    assert "attend to each other in both directions" in str(exports["gguf"])
    report = export(tmp_path / "run", tmp_path / "exported", dtype="fp32")
    assert report.difference is not None and report.allowed is not None and report.same_text
    assert report.difference <= report.allowed and report.rows == 4
    written = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert written["model_type"] == "paligemma"
    assert written["text_config"]["use_bidirectional_attention"]
    again = built(parsed(text.replace(str(tmp_path / "vlm"), str(tmp_path / "exported"))))
    rows = rows_of(parsed(text))
    assert largest(logits_of(again, rows), logits_of(model, rows)) <= 1e-3
    merge(tmp_path / "run", tmp_path / "merged", dtype="fp32")
    (tmp_path / "vlm").rename(tmp_path / "gone")
    merged = load_model(tmp_path / "merged", dtype=torch.float32, model_class=VisionLanguageModel)
    assert largest(logits_of(merged, rows), logits_of(model, rows)) <= 1e-3


def test_the_adapter_has_the_whole_models_names(recipe: str, tmp_path: Path) -> None:
    """Plain PEFT over the checkpoint answers as the model; the tower's layers are left alone."""
    trained("paligemma", recipe, tmp_path)
    report = export(tmp_path / "run", tmp_path / "adapter", format="adapter")
    assert report.difference is not None and report.allowed is not None and report.same_text
    assert report.difference <= report.allowed and report.rows == 4
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.multi_modal_projector.linear"]
    assert all(name.startswith("model.language_model.") for name in config["target_modules"])


@pytest.mark.slow
def test_a_run_is_resumed_bit_for_bit_and_merged_without_the_original(
    recipe: str, tmp_path: Path
) -> None:
    assert_resumed_and_merged(recipe, tmp_path)


OF_TURNS = PLAIN[PLAIN.index("        turns = [") : PLAIN.index("        with torch")]
OF_PREFIX = """
        inputs = processor(
            images=part["image"],
            text="<image>" + row["question"],
            suffix=row["answer"],
            return_tensors="pt",
        )
        del inputs["labels"]
"""


@pytest.mark.slow
def test_what_was_trained_opens_in_a_process_without_vlm_tune(recipe: str, tmp_path: Path) -> None:
    model = trained("paligemma", recipe, tmp_path)
    export(tmp_path / "run", tmp_path / "exported", dtype="fp32")
    rows = rows_of(parsed(recipe))[:3]
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
    # transformers' sdpa leaves out the soft cap of Gemma 2's attention before 5.23.
    program = PLAIN.replace(OF_TURNS, OF_PREFIX).replace(
        "(source, dtype=torch.float32)",
        '(source, dtype=torch.float32, attn_implementation="eager")',
    )
    assert "eager" in program
    run([sys.executable, "-c", program, str(folder)], cwd=tmp_path, PYTHONPATH=OTHER_PATHS)
    names, logits = json.loads((folder / "logits.json").read_text())
    assert names == ["PaliGemmaForConditionalGeneration", "PaliGemmaProcessor"]
    omitted = omitted_cap(AutoConfig.from_pretrained(folder))
    for row, theirs in zip(rows, logits, strict=True):
        batch = batch_of(model, model.processor.examples(row))
        with torch.no_grad():
            ours = model.llm.supervised_logits(model.embed(batch), batch)
        other = torch.tensor(theirs)[(batch.labels[0] != IGNORE_INDEX).nonzero()[:, 0]]
        if omitted is not None:
            other = omitted * (other / omitted).tanh()
        assert largest(ours, other) <= 1e-5 * max(1.0, float(ours.abs().max()))


def test_attention_that_can_not_be_quick_says_why(recipe: str) -> None:
    """Without a window a Gemma's attention would be the operator's."""
    model = built(parsed(recipe))
    for device in ("cpu", "cuda"):
        assert BOTH_WAYS in str(running(model.llm, torch.bfloat16, torch.device(device))), device
