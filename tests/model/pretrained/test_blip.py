"""Recipes that start from a BLIP-2 or InstructBLIP: branches, packed rows, plans, resumed runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch

from tests.helpers.family_runs import (
    assert_planned_without_weights,
    assert_resumed_and_merged,
    logits_of,
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
    run,
    tuned_by,
    wake_adapters,
    with_tune,
)
from tests.helpers.transformers_parity import write_rows
from tests.helpers.vlm_samples import Blip, save_blip, with_pretrained
from tests.model.pretrained.test_idefics3 import OTHER_PATHS, PLAIN
from tests.model.pretrained.test_tiled import trained
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.packing import pack_layout
from vlm_tune.data.prepare.run import prepare
from vlm_tune.data.types import IGNORE_INDEX
from vlm_tune.errors import DataError, RecipeError
from vlm_tune.exporting import export, possible_exports
from vlm_tune.generation.answering import answer_prompts
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.language.decoding import Decoding

Tiny = Callable[..., str]
Over = Callable[..., str]
Language = Literal["t5", "opt", "llama"]
TEMPLATES: dict[Language, str] = {"t5": "blip2", "opt": "blip2_opt", "llama": "instructblip"}
CASES: list[tuple[Blip, Language]] = [
    ("blip-2", "opt"),
    ("instructblip", "llama"),
    ("blip-2", "t5"),
    ("instructblip", "t5"),
]


@pytest.fixture
def over(tiny_recipe: Tiny, tmp_path: Path) -> Over:
    """A LoRA recipe over a tiny BLIP-2 or InstructBLIP in `vlm`; its LLM is a decoder or a T5."""

    def text(kind: Blip, language: Language | None = None) -> str:
        language = language or ("opt" if kind == "blip-2" else "llama")
        plain = tiny_recipe("seq2seq" if language == "t5" else "causal")
        save_blip(tmp_path / "vlm", rows_of(parsed(plain)), kind, language)
        start = with_pretrained(plain, tmp_path / "vlm", TEMPLATES[language])
        return with_tune(start, LORA_TUNE)

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


@pytest.fixture
def trained_rows(color_rows: Path) -> None:
    """Rows about images of odd sizes, two of them between words, and about none."""
    write_rows(color_rows)


@pytest.mark.parametrize(("kind", "language"), CASES)
@pytest.mark.usefixtures("trained_rows")
def test_what_was_trained_is_written_as_what_it_was(
    kind: Blip, language: Language, over: Over, tmp_path: Path
) -> None:
    """Verified by transformers: ids, pixels, logits and text; and it is a start again."""
    text = over(kind, language)
    model = trained(text, tmp_path)
    assert possible_exports(parsed(text))["transformers"] is None
    report = export(tmp_path / "run", tmp_path / "exported", dtype="fp32")
    assert report.difference is not None and report.allowed is not None and report.same_text
    # transformers' model takes no row without an image.
    assert report.difference <= report.allowed and report.rows == 3
    written = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert written["model_type"] == kind
    assert written["text_config"]["eos_token_id"] == model.processor.stop_ids
    again = built(parsed(text.replace(str(tmp_path / "vlm"), str(tmp_path / "exported"))))
    rows = rows_of(parsed(text))
    assert largest(logits_of(again, rows), logits_of(model, rows)) <= 1e-3


@pytest.mark.parametrize(("kind", "language"), CASES[:3])
@pytest.mark.usefixtures("trained_rows")
def test_the_adapter_has_the_whole_models_names(
    kind: Blip, language: Language, over: Over, tmp_path: Path
) -> None:
    """Plain PEFT over the checkpoint answers as the model; the queries have no place in it."""
    plain = over(kind, language)
    assert "connector.queries is trained too" in str(possible_exports(parsed(plain))["adapter"])
    frozen = '\n  - {match: "connector.queries", how: frozen}'
    text = plain.replace("\ntune:", f"\ntune:{frozen}")
    trained(text, tmp_path)
    assert possible_exports(parsed(text))["adapter"] is None
    report = export(tmp_path / "run", tmp_path / "adapter", format="adapter")
    assert report.difference is not None and report.allowed is not None and report.same_text
    assert report.difference <= report.allowed and report.rows == 3
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert all(name.startswith("language_model.") for name in config["target_modules"])
    assert "qformer.encoder.layer.2.crossattention.attention.value" in config["modules_to_save"]


OF_TURNS = PLAIN[PLAIN.index("        turns = [") : PLAIN.index("        with torch")]
OF_TEXTS = """
        text = row["question"] + " " + row["answer"] + row["end"]
        inputs = processor(images=part["image"], text=text, return_tensors="pt")
        if "qformer_input_ids" in inputs:
            read = processor(text=row["question"], return_tensors="pt")
            inputs["qformer_input_ids"] = read["qformer_input_ids"]
            inputs["qformer_attention_mask"] = read["qformer_attention_mask"]
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blip-2", "instructblip"])
def test_what_was_trained_opens_in_a_process_without_vlm_tune(
    kind: Blip, over: Over, tmp_path: Path
) -> None:
    text = over(kind)
    model = trained(text, tmp_path)
    export(tmp_path / "run", tmp_path / "exported", dtype="fp32")
    rows = rows_of(parsed(text))[:3]
    written = [
        {
            "image": str(row.media[0].source),
            "question": row.messages[0].text,
            "answer": row.messages[1].text,
            "end": "\n" if kind == "blip-2" else "</s>",
        }
        for row in rows
    ]
    (tmp_path / "rows.json").write_text(json.dumps(written))
    folder = tmp_path / "exported"
    program = PLAIN.replace(OF_TURNS, OF_TEXTS)
    run([sys.executable, "-c", program, str(folder)], cwd=tmp_path, PYTHONPATH=OTHER_PATHS)
    names, logits = json.loads((folder / "logits.json").read_text())
    stem = "Blip2" if kind == "blip-2" else "InstructBlip"
    assert names == [f"{stem}ForConditionalGeneration", f"{stem}Processor"]
    for row, theirs in zip(rows, logits, strict=True):
        batch = batch_of(model, model.processor.examples(row))
        with torch.no_grad():
            ours = model.llm.supervised_logits(model.embed(batch), batch)
        other = torch.tensor(theirs)[(batch.labels[0] != IGNORE_INDEX).nonzero()[:, 0]]
        assert largest(ours, other) <= 1e-5 * max(1.0, float(ours.abs().max()))
