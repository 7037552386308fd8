"""A model without a recipe is scored on files of every form, each by its own metrics."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vlm_tune
from tests.helpers.tiny_models import built, cli, parsed
from vlm_tune.config.train import EvaluateSection
from vlm_tune.errors import RecipeError
from vlm_tune.evaluation.evaluate_rows import chosen_settings, read_files
from vlm_tune.model.checkpoint import save_model

ROWS: dict[str, list[dict[str, Any]]] = {
    "vqa": [{"question": "color?", "answers": ["red"] * 8 + ["dark red", "blue"]}],
    "multiple_choice": [{"question": "which?", "choices": ["red", "blue"], "answer": 0}],
    "caption": [{"caption": ["a red image", "it is red"]}],
    "classify": [{"label": "red", "choices": ["red", "blue"]}],
    "retrieval": [{"answer": "red", "candidates": ["red", "blue"]}],
    "ocr": [{"text": "RED"}],
    "translate": [{"translation": "rot", "target_language": "German", "text": "red"}],
    "messages": [
        {
            "messages": [
                {"role": "user", "content": "where?"},
                {"role": "assistant", "content": "it is at [1, 2, 3, 4] I think"},
            ]
        }
    ],
}
METRICS = {
    "vqa": {"vqa_accuracy"},
    "multiple_choice": {"choice_letter"},
    "caption": {"bleu", "chrf", "rouge_l", "cider"},
    "classify": {"balanced_accuracy", "f1_macro"},
    "retrieval": {"choice_text"},
    "ocr": {"anls"},
    "translate": {"bleu", "chrf"},
    "messages": {"chrf", "rouge_l", "box_iou", "box_accuracy"},
}


@pytest.fixture
def files(color_rows: Path) -> list[Path]:
    """A file of two rows, about two images, of every form; the images lie beside them."""
    paths = []
    for form, rows in ROWS.items():
        path = color_rows.parent / f"{form}.jsonl"
        images = ("red.png", "blue.png")
        lines = [{**row, "images": [image]} for image in images for row in rows]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        paths.append(path)
    return paths


def test_every_form_is_scored_without_a_recipe(
    tiny_recipe: Callable[..., str], files: list[Path], tmp_path: Path
) -> None:
    model = tmp_path / "alone" / "model"
    save_model(built(parsed(tiny_recipe("causal"))), model)
    scores = vlm_tune.evaluate(model, data=files)
    assert scores.n == 2 * len(ROWS)
    for form, names in METRICS.items():
        entry = scores.by_source[form]
        assert entry["metrics"].keys() == {"exact_match", *names}
        assert all(score["n"] == 2 for score in entry["metrics"].values())
        assert entry["metrics"]["exact_match"]["low"] is not None
    # Without a recipe there are no training rows.
    assert scores.baselines.keys() == {"blind"}
    options = ["--metrics", "anls,relaxed_accuracy", "--baselines", "none", "--limit", "2"]
    printed = cli("eval", str(model), "--data", str(files[0]), *options, "--json")
    summary = json.loads(printed)
    assert list(summary["metrics"]) == ["anls", "relaxed_accuracy"] and summary["n"] == 2
    assert "baselines" not in summary


def test_files_of_one_name_are_told_apart(files: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    copy = other / files[0].name
    for image in ("red.png", "blue.png"):
        (other / image).write_bytes((files[0].parent / image).read_bytes())
    copy.write_text(files[0].read_text())
    rows = read_files([files[0], copy, files[1]])
    names = list(dict.fromkeys(row.source_name for row in rows))
    assert names == [str(files[0]), str(copy), files[1].stem]
    assert len(read_files(files[1])) == 2
    with pytest.raises(RecipeError, match="no file is named"):
        read_files([])
    with pytest.raises(RecipeError, match="data: expected a path or a list of paths, got 5"):
        read_files(5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("metrics", "baselines", "message"),
    [
        ("exact_match", None, "--metrics: expected a list of names"),
        ([5], None, "--metrics: expected a list of names"),
        (5, None, "--metrics: expected a list of names"),
        (None, "all", "--baselines: expected a list of names"),
        ([None], None, "--metrics: expected a list of names"),
        (-7, None, "--metrics: expected a list of names"),
        (None, True, "--baselines: expected a list of names"),
        (None, ["deaf"], "'deaf' is not one of majority, same_question, mean_box"),
        (["exact"], None, "'exact' is no metric"),
        ([], None, "--metrics: no metric is named"),
    ],
)
def test_names_of_a_call_are_checked(metrics: Any, baselines: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        chosen_settings(EvaluateSection(), metrics, baselines)


def test_a_call_replaces_what_it_names() -> None:
    section = EvaluateSection(metrics=["anls"], max_new_tokens=5)
    chosen = chosen_settings(section, None, [])
    assert (chosen.metrics, chosen.baselines, chosen.max_new_tokens) == (["anls"], [], 5)
    assert chosen_settings(section, ["bleu"], "auto").metrics == ["bleu"]
