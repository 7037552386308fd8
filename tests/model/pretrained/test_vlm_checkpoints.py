"""Recipes that start from a vision-language model, by commands and the folders they write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.helpers.family_runs import logits_of
from tests.helpers.tiny_models import (
    LORA_TUNE,
    assert_same_outputs,
    batch_of,
    built,
    examples_of,
    largest,
    parsed,
    prepare_rows,
    rows_of,
    wake_adapters,
    with_tune,
)
from tests.helpers.vlm_samples import save_blip, save_llava, save_llava_original, with_pretrained
from vlm_tune.cli import app
from vlm_tune.config.model import Boxes
from vlm_tune.exporting import export
from vlm_tune.exporting.merge import merge
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.memory_plan.plan import plan
from vlm_tune.model.build import bare_model, build_processor
from vlm_tune.model.checkpoint import load_model, save_model
from vlm_tune.model.tuning import apply_rules

Tiny = Callable[..., str]


def command(*arguments: str) -> str:
    """Output of `vlm-tune`, run in this process; asserts that it succeeds."""
    invocation = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert invocation.exit_code == 0, invocation.output
    return invocation.output


@pytest.fixture
def llava(tiny_recipe: Tiny, tmp_path: Path) -> str:
    """A LoRA recipe over a tiny LLaVA."""
    text = tiny_recipe("causal")
    save_llava(tmp_path / "llava", rows_of(parsed(text)))
    return with_tune(with_pretrained(text, tmp_path / "llava", "vicuna"), LORA_TUNE)


@pytest.fixture
def instructblip(tiny_recipe: Tiny, tmp_path: Path) -> str:
    """A LoRA recipe over a tiny InstructBLIP."""
    text = tiny_recipe("seq2seq")
    save_blip(tmp_path / "blip", rows_of(parsed(text)), "instructblip")
    return with_tune(with_pretrained(text, tmp_path / "blip", "blip2"), LORA_TUNE)


def test_boxes_are_written_as_the_family_does_or_as_the_recipe_says(
    llava: str, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    assert build_processor(parsed(llava), []).boxes == Boxes(unit="norm1", decimals=2)
    recipe = parsed(llava, model__boxes={"unit": "pixels"})
    assert build_processor(recipe, []).boxes == Boxes(unit="pixels")
    save_model(built(recipe), tmp_path / "own")
    again = with_pretrained(tiny_recipe("causal"), tmp_path / "own", "vicuna")
    assert build_processor(parsed(again), []).boxes == Boxes(unit="pixels")


def test_a_llava_is_trained_merged_and_exported_by_the_command_line(
    llava: str, tmp_path: Path
) -> None:
    """All that is written is a LLaVA again, with the trained model's logits.

    The merged folder needs no original.
    """
    from transformers import LlavaForConditionalGeneration

    (tmp_path / "recipe.yaml").write_text(llava)
    command("sft", str(tmp_path / "recipe.yaml"))
    assert "USER:" in command("show", str(tmp_path / "recipe.yaml"))
    rows = rows_of(parsed(llava))
    trained = load_model(tmp_path / "run", dtype=torch.float32)
    assert trained.config.model.llm.name == str(tmp_path / "llava")
    checkpoint = max((tmp_path / "run").glob("stages/*/checkpoints/step-*"))
    expected = logits_of(trained, rows)
    assert_same_outputs(logits_of(load_model(checkpoint, dtype=torch.float32), rows), expected)
    assert largest(logits_of(built(parsed(llava)), rows), expected) > 1e-4
    export(tmp_path / "run", tmp_path / "exported", dtype="fp32")
    merge(tmp_path / "run", tmp_path / "merged", dtype="fp32")
    (tmp_path / "llava").rename(tmp_path / "gone")
    assert (
        largest(logits_of(load_model(tmp_path / "merged", dtype=torch.float32), rows), expected)
        <= 1e-4
    )
    theirs: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "exported").eval()
    batch = batch_of(
        trained, [example for row in rows for example in trained.processor.examples(row)]
    )
    assert batch.pixels is not None
    with torch.no_grad():
        logits = theirs(
            input_ids=batch.input_ids.masked_fill(batch.image_mask, theirs.config.image_token_id),
            pixel_values=(batch.pixels.float() * trained.tower.scale - trained.tower.offset)[
                batch.media_index
            ],
            attention_mask=batch.attention_mask.long(),
        ).logits
    assert largest(logits[batch.labels != -100], expected) <= 1e-5 * max(
        1.0, float(expected.abs().max())
    )


def test_an_exported_llava_is_a_start_again(llava: str, tmp_path: Path) -> None:
    model = built(parsed(llava))
    rows = rows_of(parsed(llava))
    expected = logits_of(model, rows)
    model.config = model.config.model_copy(update={"precision": "fp32"})
    model.save_pretrained(tmp_path / "saved")
    export(tmp_path / "saved", tmp_path / "exported", dtype="fp32")
    again = built(parsed(llava.replace(str(tmp_path / "llava"), str(tmp_path / "exported"))))
    assert largest(logits_of(again, rows), expected) <= 1e-5


def test_an_instructblip_is_trained_and_merged(instructblip: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(instructblip)
    command("sft", str(tmp_path / "recipe.yaml"))
    rows = rows_of(parsed(instructblip))
    trained = load_model(tmp_path / "run", dtype=torch.float32, model_class=VisionLanguageModel)
    expected = logits_of(trained, rows)
    merge(tmp_path / "run", tmp_path / "merged", dtype="fp32")
    (tmp_path / "blip").rename(tmp_path / "gone")
    merged = load_model(tmp_path / "merged", dtype=torch.float32, model_class=VisionLanguageModel)
    assert (tmp_path / "merged" / "connector_tokenizer" / "tokenizer.json").is_file()
    assert largest(logits_of(merged, rows), expected) <= 1e-4
    answers = [
        model.chat("what color is it?", images=[tmp_path / "red.png"])
        for model in (merged, trained)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", ["llava", "instructblip"])
def test_quantised_loading_and_the_plan(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The LLM inside is packed, nothing else.

    The plan has the same parameters and reads no weights.
    """
    text = request.getfixturevalue(kind).replace("model: {", "model: {llm: {quantize: nf4}, ")
    recipe = parsed(text)
    model = built(recipe)
    tuned = apply_rules(model, recipe.tune, learning_rate=1e-3, precision=torch.float32)
    for file in tmp_path.glob("*/model.safetensors"):
        file.unlink()
    planned = plan(recipe)
    (stage,) = planned.stages
    assert [(row.match, row.trained, row.total) for row in stage.tuning] == [
        (row.match, row.trained, row.total) for row in tuned.table
    ]
    assert planned.quantize == "nf4"
    bare, _ = bare_model(recipe)
    tokens = model.processor.spec.tokens_per_image
    assert (
        tokens
        == bare.processor.spec.tokens_per_image
        == build_processor(recipe, []).spec.tokens_per_image
    )


def test_what_the_recipe_says_of_tower_and_llm_is_used(llava: str) -> None:
    model = built(
        parsed(llava.replace("model: {", "model: {tower: {resize: squash, image_size: 48}, "))
    )
    assert (
        model.tower.image_size,
        model.processor.images.resize,
        model.processor.spec.tokens_per_image,
    ) == (48, "squash", 9)


def test_a_projector_beside_a_plain_language_model(tiny_recipe: Tiny, tmp_path: Path) -> None:
    """The LLaVA repository's pretrained projectors.

    One file, the CLIP and the LLM by their own names.
    """
    from safetensors.torch import save_file

    text = tiny_recipe("causal")
    rows = rows_of(parsed(text))
    theirs = save_llava(tmp_path / "llava", rows)
    save_llava_original(tmp_path / "original", theirs, tmp_path / "llava", tower=False)
    projector = theirs.model.multi_modal_projector.state_dict()
    names = {"linear_1": "0", "linear_2": "2"}
    save_file(
        {f"model.mm_projector.{names[key[:8]]}{key[8:]}": v for key, v in projector.items()},
        tmp_path / "mm_projector.safetensors",
    )
    whole = built(parsed(with_pretrained(text, tmp_path / "original", "vicuna")))
    parts = f"""{{
      tower: {{kind: transformers, name: {tmp_path / "original" / "clip"}, layer: -2, resize: pad}},
      connector: {{kind: mlp, depth: 2, weights: {tmp_path / "mm_projector.safetensors"}}},
      llm: {{kind: causal, name: {tmp_path / "original"}}}}}"""
    head, _, rest = with_pretrained(text, tmp_path / "original", "vicuna").partition("\nmodel: ")
    model = built(parsed(f"{head}\nmodel: {parts}{rest[rest.index(chr(10)) :]}"))
    assert_same_outputs(logits_of(model, rows), logits_of(whole, rows))


def test_instructions_are_read_by_the_connectors_own_tokenizer(
    instructblip: str, tmp_path: Path
) -> None:
    """The same in a padded batch, and as one; case and spaces are BERT's to drop."""
    recipe = parsed(instructblip)
    model = built(recipe).eval()
    wake_adapters(model)
    prepared = prepare_rows(tmp_path / "rows.jsonl", rows_of(recipe), model.processor)
    examples = examples_of(prepared)
    whole = batch_of(model, examples)
    with torch.no_grad():
        media = model.media(whole)
        assert media is not None
        for place, example in enumerate(examples):
            alone = model.media(batch_of(model, [example]))
            assert alone is not None
            assert largest(media[place], alone[0]) <= 1e-5
    reader = model.connector.reader
    assert reader is not None
    rows = [example.input_ids[~example.image_mask] for example in examples[:2]]
    texts = [reader.tokenizer.decode(reader._ids(tuple(row.tolist()))) for row in rows]
    assert texts == ["[CLS] what color is it ? [SEP]", "[CLS] is it blue ? [SEP]"]
