"""Recipes that start from models that see images as tiles: joined, planned, exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.tiled_samples import SAMPLES, Sample, save_internvl
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
from tests.helpers.vlm_samples import with_pretrained
from tests.model.pretrained.test_idefics3 import logits_of
from vlm_tune.data.prepare.run import prepare
from vlm_tune.exporting import export, possible_exports
from vlm_tune.generation.answering import answer_prompts
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.memory_plan.plan import plan
from vlm_tune.model.build import build_processor
from vlm_tune.model.language.decoding import Decoding

Tiny = Callable[..., str]
FAMILIES = ["internvl"]
"""The samples that are tuned and written; others differ in their towers and LLMs alone."""


@pytest.fixture(params=FAMILIES)
def sample(request: pytest.FixtureRequest) -> Sample:
    return SAMPLES[request.param]


@pytest.fixture
def recipe_text(sample: Sample, tiny_recipe: Tiny, tmp_path: Path) -> str:
    """A recipe over a tiny model of the family: LoRA on the LLM, the connector in full."""
    sample.save(tmp_path / "vlm")
    text = with_pretrained(tiny_recipe("causal"), tmp_path / "vlm", sample.template)
    return with_tune(text, LORA_TUNE)


def trained(text: str, folder: Path) -> VisionLanguageModel:
    """The recipe's model as if trained, saved in `run` beside its recipe."""
    model = built(parsed(text))
    tuned_by(model, parsed(text))
    wake_adapters(model, 0.1)
    with torch.no_grad():
        for parameter in model.connector.parameters():
            parameter.mul_(1.5)
    (folder / "run").mkdir()
    model.save_pretrained(folder / "run" / "model")
    (folder / "run" / "recipe.yaml").write_text(text)
    return model.eval()


def test_losses_gradients_and_answers_of_branches_equal_rows(
    recipe_text: str, color_rows: Path
) -> None:
    recipe = parsed(recipe_text)
    model = built(recipe)
    tuned_by(model, recipe)
    wake_adapters(model)
    grouped = recipe.data.model_copy(update={"group": "image"})
    branches = examples_of(prepare(grouped, grouped.train, model.processor, seed=recipe.seed))
    assert [example.questions for example in branches] == [2] * 4
    rows = [example for row in rows_of(recipe) for example in model.processor.examples(row)]
    assert all(branch.media in [row.media for row in rows] for branch in branches)
    alone, expected = loss_and_gradients(model, [batch_of(model, [example]) for example in rows])
    together, gradients = loss_and_gradients(model, [batch_of(model, branches)])
    assert float(together) == pytest.approx(float(alone), rel=1e-5)
    assert_close(gradients, expected)
    model.eval()
    prompts = model.processor.prompts(rows_of(recipe))
    fetch = model.processor.images
    one_by_one = [
        answer_prompts(model, [prompt], Decoding(4), fetch=fetch)[0] for prompt in prompts
    ]
    assert answer_prompts(model, prompts, Decoding(4), fetch=fetch) == one_by_one


def test_the_plan_reads_no_weights_and_knows_every_slot(recipe_text: str, tmp_path: Path) -> None:
    recipe = parsed(recipe_text)
    model = built(recipe)
    tuned = tuned_by(model, recipe)
    (tmp_path / "vlm" / "model.safetensors").unlink()
    (stage,) = plan(recipe).stages
    assert [(row.match, row.trained, row.total) for row in stage.tuning] == [
        (row.match, row.trained, row.total) for row in tuned.table
    ]
    processor = build_processor(recipe, [])
    for row in rows_of(recipe):
        planned, example = processor.prompt(row), model.processor.prompt(row)
        assert planned.input_ids.tolist() == example.input_ids.tolist()
        assert planned.media == example.media


def test_what_was_trained_is_written_as_what_it_was(recipe_text: str, tmp_path: Path) -> None:
    """Verified by transformers: ids, pixels, logits and text; and it is a start again."""
    model = trained(recipe_text, tmp_path)
    assert possible_exports(parsed(recipe_text))["transformers"] is None
    report = export(tmp_path / "run", tmp_path / "exported", dtype="fp32")
    assert report.difference is not None and report.allowed is not None and report.same_text
    assert report.difference <= report.allowed and report.rows == 4
    config, written = (
        json.loads((tmp_path / folder / "config.json").read_text())
        for folder in ("vlm", "exported")
    )
    assert written["model_type"] == config["model_type"]
    again = built(parsed(recipe_text.replace(str(tmp_path / "vlm"), str(tmp_path / "exported"))))
    rows = rows_of(parsed(recipe_text))
    assert largest(logits_of(again, rows), logits_of(model, rows)) <= 1e-3


def test_the_adapter_has_the_whole_models_names(
    sample: Sample, recipe_text: str, tmp_path: Path
) -> None:
    """Plain PEFT over the checkpoint answers as the model; the tower's layers are left alone."""
    trained(recipe_text, tmp_path)
    assert possible_exports(parsed(recipe_text))["adapter"] is None
    report = export(tmp_path / "run", tmp_path / "adapter", format="adapter")
    assert report.difference is not None and report.allowed is not None and report.same_text
    assert report.difference <= report.allowed and report.rows == 4
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "vlm")
    assert config["modules_to_save"] == sample.saved
    assert len(config["target_modules"]) == 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in config["target_modules"])


def test_a_tied_head_and_a_smaller_frame_are_written(tiny_recipe: Tiny, tmp_path: Path) -> None:
    """Positions are interpolated by transformers as here."""
    theirs = save_internvl(tmp_path / "vlm", tied=True)
    extra = ", tower: {image_size: 16, split: {kind: internvl, max_tiles: 2}}"
    recipe = with_pretrained(tiny_recipe("causal"), tmp_path / "vlm", "internvl", extra)
    text = with_tune(recipe, LORA_TUNE)
    model = trained(text, tmp_path)
    assert model.processor.spec.tokens_per_image == 1
    assert torch.equal(model.llm.head.weight, theirs.lm_head.weight)
    report = export(tmp_path / "run", tmp_path / "exported", dtype="fp32")
    assert report.difference is not None and report.allowed is not None and report.same_text
    assert report.difference <= report.allowed
