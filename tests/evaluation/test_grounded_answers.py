"""Answers with boxes are read by the model's convention, and scored in pixels of the original."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.tiny_models import built, parsed
from tests.helpers.tiny_recipes import tiny_text, write_color_rows
from vlm_tune.config.load import load_recipe
from vlm_tune.config.train import EvaluateSection
from vlm_tune.data.prepare.run import conversations
from vlm_tune.data.sources.easy_vqa import shape_box
from vlm_tune.data.sources.registry import read_path
from vlm_tune.evaluation import answering, predict
from vlm_tune.evaluation.assessment import assess
from vlm_tune.evaluation.evaluate import score
from vlm_tune.evaluation.predict import write_answers
from vlm_tune.evaluation.registry import METRICS
from vlm_tune.evaluation.rewards import Sample, reward_functions
from vlm_tune.generation.answers import Answer
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.build import build_processor
from vlm_tune.model.checkpoint import save_model
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.resources import resource_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that pads images and writes boxes from 0 to 1, and rows about images of 40 x 20."""
    folder = tmp_path_factory.mktemp("grounded")
    text = tiny_text("causal", write_color_rows(folder), folder / "run")
    changes: dict[str, Any] = {
        "model__boxes": {"unit": "norm1", "decimals": 2},
        "model__tower__resize": "pad",
    }
    save_model(built(parsed(text, **changes)), folder / "model")
    Image.new("RGB", (40, 20)).save(folder / "wide.png")
    rows = [
        {"image": "wide.png", "phrase": "a cup", "box": [10, 0, 20, 10], "category": "cup"},
        {"image": "wide.png", "phrase": "a cat", "box": [0, 0, 40, 20], "category": "cat"},
        {"image": "wide.png", "phrase": "its eye", "point": [20, 10], "category": "cat"},
    ]
    (folder / "grounding.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> VisionLanguageModel:
    return VisionLanguageModel.from_pretrained(folder / "model").eval()


# In the padded square of 40 x 40 the image begins at 10.
GENERATED = ["[0.25, 0.25, 0.50, 0.50]", "at [0.00, 0.50, 1.00, 0.75].", "[0.50, 0.53]"]


def test_scores_are_of_pixels_of_the_original(
    folder: Path, model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, _ = read_path(str(folder / "grounding.jsonl"), seed=0)
    monkeypatch.setattr(answering, "answer_prompts", lambda *_, **__: list(GENERATED))
    scores = score(model, rows, decoding=Decoding(8), loss=False)
    assert [answer.generated for answer in scores.answers] == [
        "[10, 0, 20, 10]",
        "at [0, 10, 40, 20].",
        "[20, 11.2]",
    ]
    assert [answer.references.size for answer in scores.answers] == [(40, 20)] * 3
    assess(scores, None)
    values = {name: entry["value"] for name, entry in scores.metrics.items()}
    assert values["box_iou"] == pytest.approx(0.75) and values["point_accuracy"] == 1.0
    assert values["box_accuracy"] == 1.0
    assert scores.by_category["cup"]["metrics"]["box_iou"]["value"] == 1.0
    assert scores.by_category["cat"]["metrics"]["box_iou"]["value"] == pytest.approx(0.5)


def test_predictions_have_regions_beside_the_models_own_text(
    folder: Path, model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "asked.jsonl"
    path.write_text(
        json.dumps({"image": "wide.png", "phrase": "a cup"})
        + "\n"
        + json.dumps({"image": "wide.png", "phrase": "a cat"})
        + "\n"
    )
    rows, unanswered = read_path(str(path), seed=0, unanswered=True)
    answers = [Answer(text, "stop", ()) for text in (GENERATED[0], "nowhere")]
    monkeypatch.setattr(predict, "prompt_answers", lambda *_, **__: answers)
    write_answers(model, rows, unanswered, folder / "out.jsonl", decoding=Decoding(8), batch_size=2)
    first, second = map(json.loads, (folder / "out.jsonl").read_text().splitlines())
    assert (first["answer"], first["expected"]) == (GENERATED[0], None)
    assert np.allclose(first["regions"], [[10, 0, 20, 10]]) and "regions" not in second


def test_a_saved_model_reads_regions_by_its_convention(
    folder: Path, model: VisionLanguageModel
) -> None:
    regions = model.read_regions("[0.00, 0.50, 1.00, 0.75] [0.5, 0.5]", folder / "wide.png")
    assert np.allclose(regions[0], (0, 10, 40, 20)) and np.allclose(regions[1], (20, 10))
    assert model.read_regions("nowhere", folder / "wide.png") == []


def test_rewards_are_of_pixels_too(folder: Path, model: VisionLanguageModel) -> None:
    rows, _ = read_path(str(folder / "grounding.jsonl"), seed=0)
    text = model.processor.grounding.read_back(rows[1], GENERATED[1])
    objective: Any = parsed(
        tiny_text("causal", folder / "messages.jsonl", folder / "run"),
        objective={"kind": "grpo", "reward_funcs": ["box_iou"]},
    ).objective
    (reward,) = reward_functions(objective)
    assert reward([Sample(rows[1], text, (), text)]) == pytest.approx([0.5])


def test_the_metrics_are_those_that_recipes_name() -> None:
    settings = EvaluateSection(metrics=["point_in_box", "point_accuracy"])
    assert settings.metrics is not None and set(settings.metrics) <= METRICS.keys()


def test_the_recipes_answers_fit_their_limit_and_say_where_the_shapes_are() -> None:
    """Boxes in whole pixels of a small frame, read back to pixels of the images."""
    recipe = load_recipe(resource_folder("recipes") / "easyvqa-grounding.yaml")
    rows = list(islice(conversations(recipe.data, recipe.data.test, recipe.seed), 300))
    processor = build_processor(recipe, rows)
    ious = []
    for row in rows:
        (example,) = processor.examples(row)
        assert example.supervised <= recipe.evaluate.max_new_tokens
        text = processor.decode(example.labels[example.labels >= 0].tolist())
        (region,) = processor.grounding.read(text, (64, 64))
        box = np.array(shape_box(Path(str(row.media[0].source))))
        read = np.array(region.coordinates)
        both = np.minimum(read[2:], box[2:]) - np.maximum(read[:2], box[:2])
        overlap = both.clip(0).prod()
        ious.append(overlap / ((read[2:] - read[:2]).prod() + (box[2:] - box[:2]).prod() - overlap))
    # Half of a frame's pixel is one of an image's, on each side.
    assert min(ious) > 0.5
    assert sum(ious) / len(ious) > 0.88
