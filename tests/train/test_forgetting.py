"""Rows of other tasks are scored before and after training, and compared row by row."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.helpers.tiny_models import parsed
from vlm_tune.api import sft
from vlm_tune.errors import DataError
from vlm_tune.evaluation.answer_files import load_answers
from vlm_tune.events import Event, FinalScores
from vlm_tune.rendering.terminal import print_scores
from vlm_tune.train import forgetting


@pytest.fixture
def recipe_of(tiny_recipe: Callable[..., str], color_rows: Path, tmp_path: Path) -> Any:
    other = tmp_path / "other.jsonl"
    rows = [{"prompt": f"say {word}", "completion": word} for word in ("a", "b", "c")]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part = [{"kind": "file", "path": str(color_rows)}]
    changes: dict[str, Any] = {
        "data__validation": [],
        "data__test": part,
        "train__steps": 60,
        "train__learning_rate": 0.02,
        "evaluate__baselines": [],
        "evaluate__samples": 0,
        "evaluate__metrics": ["exact_match", "perplexity"],
        "evaluate__also": {"words": str(other), "colors": str(color_rows)},
    }
    return lambda **more: parsed(tiny_recipe("causal"), **(changes | more))


def test_a_run_tells_what_it_forgot_and_learned(recipe_of: Any) -> None:
    events: list[Event] = []
    run = sft(recipe_of(), show=events.append)
    also = run.result["also"]
    assert {name: each["n"] for name, each in also.items()} == {"words": 3, "colors": 8}
    for name, each in also.items():
        for when, side in (("before", "first"), ("after", "second")):
            answers = load_answers(run.folder / "also" / f"{name}-{when}.jsonl")
            share = sum(answer.correct for answer in answers) / len(answers)
            assert each["metrics"]["exact_match"][side]["value"] == pytest.approx(share)
    colors = also["colors"]["metrics"]["perplexity"]
    assert colors["second"]["value"] < colors["first"]["value"]
    assert colors["difference"] == colors["second"]["value"] - colors["first"]["value"]
    assert also["words"]["metrics"]["perplexity"]["difference"] > 0
    (final,) = [event for event in events if isinstance(event, FinalScores)]
    text = io.StringIO()
    print_scores(Console(file=text, width=200), final.line())
    assert "other tasks, before and after training" in text.getvalue()
    assert re.search(r"words +│ perplexity of the reference", text.getvalue())
    page = (run.folder / "report.html").read_text()
    assert "Other tasks, before and after training" in page and "<td>words</td>" in page


def test_a_file_that_can_not_be_used_is_an_error_before_training(recipe_of: Any) -> None:
    recipe = recipe_of(evaluate__also={"words": "nowhere.jsonl"})
    with pytest.raises(DataError, match="no such file"):
        sft(recipe)
    assert not (Path(recipe.output) / "stages").exists()


def test_another_run_in_its_place_removes_the_answers(recipe_of: Any) -> None:
    run = sft(recipe_of(train__steps=1))
    assert len(list((run.folder / "also").iterdir())) == 4
    again = sft(recipe_of(train__steps=1, evaluate__also={}), overwrite=True)
    assert not (again.folder / "also").exists() and "also" not in again.result


def test_a_task_that_fails_at_the_end_is_a_note(
    recipe_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = forgetting.answer_before

    def lost(run: Path, *arguments: Any) -> None:
        before(run, *arguments)
        (run / "also" / "words-before.jsonl").unlink()

    monkeypatch.setattr("vlm_tune.train.final_scores.answer_before", lost)
    run = sft(recipe_of(train__steps=1))
    assert list(run.result["also"]) == ["colors"]
    (note,) = run.result["notes"]
    assert note.startswith("words is not compared with before training: ")
    assert "accuracy" in run.result and (run.folder / "model").is_dir()
