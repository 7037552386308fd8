"""Recipes that start from models that see images as tiles: joined, planned, exported."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.helpers.answered_jobs import job_of
from tests.helpers.family_runs import (
    assert_planned_without_weights,
    assert_resumed_and_merged,
    logits_of,
)
from tests.helpers.family_samples import TILED, Sample
from tests.helpers.talkative import talkative
from tests.helpers.tiled_samples import save_internvl
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
from tests.helpers.vlm_samples import with_pretrained
from tests.model.pretrained.test_idefics3 import OTHER_PATHS, PLAIN
from tests.serving.test_scheduler import Driver, assert_same, offline
from vlm_tune.data.batching.collate import collate
from vlm_tune.data.media_processor import distinct_frames
from vlm_tune.data.prepare.run import prepare
from vlm_tune.data.types import IGNORE_INDEX, Conversation, Message
from vlm_tune.errors import ModelError
from vlm_tune.exporting import export, possible_exports
from vlm_tune.generation.answering import answer_prompts
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.feature_cache import tower_features
from vlm_tune.model.language.decoding import Decoding

Tiny = Callable[..., str]
FAMILIES = ["internvl", "llava_next", "granite_vision", "llava_onevision"]
"""The samples that are tuned and written; others differ in their towers and LLMs alone."""
CLASSES = {
    "internvl": ("InternVL", "InternVL"),
    "llava_mistral": ("LlavaNext", "LlavaNext"),
    "granite_vision": ("LlavaNext", "LlavaNext"),
    "llava_onevision": ("LlavaOnevision", "LlavaOnevision"),
    "mistral3": ("Mistral3", "Pixtral"),
    "pixtral": ("Llava", "Pixtral"),
}
"""The beginnings of the names of transformers' model and processor, by chat format."""


@pytest.fixture(params=FAMILIES)
def sample(request: pytest.FixtureRequest) -> Sample:
    return TILED[request.param]


@pytest.fixture
def recipe_text(sample: Sample, tiny_recipe: Tiny, tmp_path: Path) -> str:
    """A recipe over a tiny model of the family: LoRA on the LLM, the connector in full."""
    sample.save(tmp_path / "vlm")
    plain = tiny_recipe("causal").replace("max_length: 128", "max_length: 256")
    text = with_pretrained(plain, tmp_path / "vlm", sample.template)
    return with_tune(text, LORA_TUNE)


def trained(text: str, folder: Path) -> VisionLanguageModel:
    """The recipe's model as if trained, saved in `run` beside its recipe."""
    model = built(parsed(text))
    tuned_by(model, parsed(text))
    wake_adapters(model, 0.1)
    with torch.no_grad():
        for parameter in model.connector.parameters():
            parameter.mul_(1.5 if parameter.requires_grad else 1)
    (folder / "run").mkdir()
    model.save_pretrained(folder / "run" / "model")
    (folder / "run" / "recipe.yaml").write_text(text)
    return model.eval()


def repeat_images(path: Path, count: int) -> None:
    """Makes each row of a messages file one of `count` images, all the same."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["images"] *= count
        row["messages"][0]["content"] = count * "<image>" + row["messages"][0]["content"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("images", [1, 2])
def test_losses_gradients_and_answers_of_branches_equal_rows(
    images: int, recipe_text: str, color_rows: Path
) -> None:
    """Also where a row has several images, of which a model may make other frames."""
    repeat_images(color_rows, images)
    recipe = parsed(recipe_text, data__max_length=512)
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


@pytest.mark.slow
def test_a_run_is_resumed_bit_for_bit_and_merged_without_the_original(
    recipe_text: str, tmp_path: Path
) -> None:
    assert_resumed_and_merged(recipe_text, tmp_path)


def test_the_plan_reads_no_weights_and_knows_every_slot(recipe_text: str, tmp_path: Path) -> None:
    assert_planned_without_weights(recipe_text, tmp_path)


def test_what_was_trained_is_written_as_what_it_was(
    recipe_text: str, color_rows: Path, tmp_path: Path
) -> None:
    """Verified by transformers: ids, pixels, logits and text; and it is a start again."""
    write_rows(color_rows)
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
    frozen = '\n  - {match: "connector.newline", how: frozen}'
    text = recipe_text
    if "model.image_newline" in sample.names:
        text = recipe_text.replace("\ntune:", f"\ntune:{frozen}")
    model = trained(text, tmp_path)
    assert possible_exports(parsed(text))["adapter"] is None
    report = export(tmp_path / "run", tmp_path / "adapter", format="adapter")
    assert report.difference is not None and report.allowed is not None and report.same_text
    assert report.difference <= report.allowed and report.rows == 4
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "vlm")
    assert config["modules_to_save"] == sample.saved
    assert len(config["target_modules"]) == 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in config["target_modules"])
    if model.connector.newline is None:
        return
    # A trained token for rows' ends has no place in it.
    why = "connector.newline is trained too"
    assert why in str(possible_exports(parsed(recipe_text))["adapter"])
    with torch.no_grad():
        model.connector.newline.add_(1)
    shutil.rmtree(tmp_path / "run" / "model")
    model.save_pretrained(tmp_path / "run" / "model")
    with pytest.raises(ModelError, match=why):
        export(tmp_path / "run", tmp_path / "other", format="adapter", verify=False)


def images_of(colors: list[str]) -> list[bytes]:
    """Images of several sizes, encoded."""
    sizes = [(60, 21), (30, 60), (40, 40)]
    encoded = []
    for color, size in zip(colors, sizes, strict=True):
        stream = io.BytesIO()
        Image.new("RGB", size, color).save(stream, "PNG")
        encoded.append(stream.getvalue())
    return encoded


def test_a_chat_and_a_server_read_each_image_once(recipe_text: str) -> None:
    """Their answers are those of the whole prompt without a cache."""
    model = talkative(recipe_text, data__max_length=1024)
    wide, high, square = images_of(["red", "blue", "green"])
    chat = model.start_chat(max_new_tokens=4)
    for question, images in (("what color is it?", wide), ("<image> and this?", high), ("so?", ())):
        answer = chat.ask(question, images)
        whole = model.answer(messages=chat.messages[:-1], max_new_tokens=4)
        assert whole.ids == answer.ids
    driver = Driver(model, batch=3)
    questions = [("what color is it?", wide), ("is it red?", wide), ("what color is it?", square)]
    jobs = [job_of(question, [image], max_new_tokens=4) for question, image in questions]
    listening = [driver.submit(job)[0] for job in jobs]
    driver.finish()
    # What is remembered of the first image serves a prompt that comes later.
    later = job_of("is it blue?", [wide], max_new_tokens=4)
    listening.append(driver.submit(later)[0])
    driver.finish()
    for each in listening:
        assert_same(each, offline(model, each.job))


def test_cached_features_give_the_losses_of_pixels(recipe_text: str) -> None:
    model = built(parsed(recipe_text)).eval()
    rows = rows_of(parsed(recipe_text))
    examples = [example for row in rows for example in model.processor.examples(row)]
    features = {
        frame: model.tower(model.processor.images(frame)[None])[0].detach()
        for example in examples
        for frame in example.media
    }
    cached = collate(examples, model.processor.spec, fetch=features.__getitem__, cached=True)
    with torch.no_grad():
        ours, expected = model(cached), model(batch_of(model, examples))
    assert float(ours.sum) == pytest.approx(float(expected.sum), rel=1e-6)


def test_features_are_cached_of_every_frame_of_the_rows(recipe_text: str, color_rows: Path) -> None:
    """Which frames an image has may depend on how many images its row has."""
    write_rows(color_rows)
    model = built(parsed(recipe_text)).eval()
    rows = rows_of(parsed(recipe_text))
    frames = distinct_frames(rows, model.processor.images)
    features = tower_features(model, frames)
    shown = [frame for row in rows for frame in model.processor.prompt(row).media]
    assert set(shown) == set(frames)
    for frame in frames:
        with torch.no_grad():
            expected = model.tower(model.processor.images(frame)[None])[0]
        assert largest(features(frame).float(), expected) <= 1e-5


def test_a_batch_without_images_gives_every_trained_weight_a_gradient(recipe_text: str) -> None:
    """Other processes wait for it, also for that of the token for rows' ends."""
    model = built(parsed(recipe_text))
    tuned_by(model, parsed(recipe_text))
    words = (Message("user", ("only words?",)), Message("assistant", ("yes",)))
    batch = batch_of(model, model.processor.examples(Conversation("row", words)))
    loss: Any = model.train()(batch)
    loss.sum.backward()
    assert all(parameter.grad is not None for parameter in model.connector.parameters())


def assert_plain_equals(
    folder: Path, model: VisionLanguageModel, sample: Sample, recipe_text: str
) -> None:
    """Asserts that a process without vlm_tune opens an export, and gives the model's logits."""
    rows = rows_of(parsed(recipe_text))[:3]
    written = [
        {
            "image": str(row.media[0].source),
            "question": row.messages[0].text,
            "answer": row.messages[1].text,
        }
        for row in rows
    ]
    (folder.parent / "rows.json").write_text(json.dumps(written))
    run([sys.executable, "-c", PLAIN, str(folder)], cwd=folder.parent, PYTHONPATH=OTHER_PATHS)
    names, logits = json.loads((folder / "logits.json").read_text())
    model_stem, processor_stem = CLASSES[sample.template]
    assert names == [f"{model_stem}ForConditionalGeneration", f"{processor_stem}Processor"]
    for row, theirs in zip(rows, logits, strict=True):
        batch = batch_of(model, model.processor.examples(row))
        with torch.no_grad():
            ours = model.llm.supervised_logits(model.embed(batch), batch)
        supervised = (batch.labels[0] != IGNORE_INDEX).nonzero()[:, 0]
        other = torch.tensor(theirs)[supervised] * sample.scale
        assert largest(ours, other) <= 1e-5 * max(1.0, float(ours.abs().max()))


@pytest.mark.slow
def test_what_was_trained_opens_in_a_process_without_vlm_tune(
    sample: Sample, recipe_text: str, tmp_path: Path
) -> None:
    model = trained(recipe_text, tmp_path)
    export(tmp_path / "run", tmp_path / "exported", dtype="fp32")
    assert_plain_equals(tmp_path / "exported", model, sample, recipe_text)


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
