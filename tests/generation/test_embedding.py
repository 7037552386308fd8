"""Vectors of images and texts are those that a contrastive objective trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.helpers.audio_samples import hearing_recipe, write_tone_rows
from tests.helpers.talkative import talkative
from tests.helpers.tiny_models import parsed, rows_of
from tests.helpers.tiny_recipes import tiny_text, write_color_rows
from vlm_tune.cli.entry import app
from vlm_tune.data.batching.collate import collate
from vlm_tune.errors import ArgumentError, DataError, ModelError
from vlm_tune.generation.chat import VisionLanguageModel

Recipes = Callable[..., str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    folder = tmp_path_factory.mktemp("model")
    return talkative(tiny_text("causal", write_color_rows(folder), folder / "run"))


@pytest.mark.parametrize("llm", ["causal", "seq2seq"])
@pytest.mark.parametrize("batch_size", [3, 100])
def test_vectors_are_those_of_the_objective(
    llm: str, batch_size: int, tiny_recipe: Recipes
) -> None:
    model = talkative(tiny_recipe(llm))
    rows = rows_of(parsed(tiny_recipe(llm)))
    examples = [model.processor.examples(row)[-1] for row in rows]
    batch = collate(examples, model.processor.spec, fetch=model.processor.images)
    with torch.no_grad():
        trained = model(batch, align=True)
    images = model.embed_images([row.media[0].source for row in rows], batch_size=batch_size)
    texts = model.embed_texts([row.messages[-1].text for row in rows], batch_size=batch_size)
    assert images.dtype == texts.dtype == np.float32
    np.testing.assert_allclose(images, trained.images.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(texts, trained.captions.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, rtol=1e-5)
    assert np.abs(images[0] - images[-1]).max() > 1e-3


def test_the_command_writes_the_vectors(
    model: VisionLanguageModel, color_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("run")
    Path("texts.txt").write_text("red\na blue one\n")
    images = [str(color_rows.parent / f"{name}.png") for name in ("red", "blue", "green")]
    invoke = CliRunner().invoke
    options = ["--texts", "texts.txt", "--output", "v.npz"]
    done = invoke(app, ["embed", "run", *images, *options, "--dtype", "fp32"])
    assert done.exit_code == 0 and "3 images and 2 texts, of width 32" in done.stdout
    written = np.load("v.npz")
    assert written["image_files"].tolist() == images
    assert written["text_lines"].tolist() == ["red", "a blue one"]
    np.testing.assert_allclose(written["images"], model.embed_images(images), atol=1e-6)
    texts = model.embed_texts(["red", "a blue one"])
    np.testing.assert_allclose(written["texts"], texts, atol=1e-6)
    Path("empty.txt").touch()
    for arguments, problem in {
        (): "name image files",
        ("none.png",): "image 1: no image file",
        ("--texts", "none.txt"): "can't be read",
        ("--texts", "empty.txt"): "has no line",
        ("--texts", "texts.txt", "--output", "texts.txt"): "would replace another file",
    }.items():
        done = invoke(app, ["embed", "run", "--output", "v.npz", *arguments])
        assert done.exit_code != 0
        assert problem in (str(done.exception) + done.output)


def test_a_vector_in_half_precision_is_a_unit_vector_in_fp32(tiny_recipe: Recipes) -> None:
    model = talkative(tiny_recipe("causal"))
    model.to(torch.bfloat16)
    model.train()
    vectors = model.embed_texts(["red", "<image> blue <|im_end|>"])
    assert vectors.dtype == np.float32 and model.training
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


WRONG: dict[str, tuple[str, Any, dict[str, Any], type[Exception], str]] = {
    "one text": ("texts", "red", {}, ArgumentError, "texts: expected a list"),
    "no text": ("texts", [], {}, ArgumentError, "at least one entry"),
    "a number": ("texts", ["red", 3], {}, ArgumentError, "text 2 must be a string, got 3"),
    "an empty text": ("texts", ["red", ""], {}, DataError, "text 2"),
    "a long text": ("texts", ["red " * 500], {}, DataError, "tokens, more than 128"),
    "one path": ("images", "red.png", {}, ArgumentError, "images: expected a list"),
    "no images": ("images", None, {}, ArgumentError, "images: expected a list"),
    "no such image": ("images", ["none.png"], {}, DataError, "image 1: no image file"),
    "a damaged image": ("images", [b"x"], {}, DataError, "image 1: not an image"),
    "a batch of none": ("texts", ["red"], {"batch_size": 0}, ArgumentError, "batch_size"),
    "a batch of images": ("images", [b"x"], {"batch_size": "2"}, ArgumentError, "batch_size"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_has_no_vector_is_named(name: str, model: VisionLanguageModel) -> None:
    kind, given, options, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        (model.embed_images if kind == "images" else model.embed_texts)(given, **options)


def test_an_image_that_is_read_with_a_question_has_no_vector(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.connector, "needs_text", True)
    with pytest.raises(ModelError, match="reads the question"):
        model.embed_images([Image.new("RGB", (8, 8))])


def test_a_model_that_hears_has_no_vectors_of_images(tmp_path: Path) -> None:
    """Nor of a clip that is passed as one: its first window alone would be heard."""
    model = talkative(hearing_recipe("causal", write_tone_rows(tmp_path), tmp_path / "run"))
    for file in ("high.wav", "low.wav"):
        with pytest.raises(ModelError, match=r"no vector here: the model's tower takes audio"):
            model.embed_images([tmp_path / file])
    assert model.embed_texts(["low"]).shape == (1, 32)
