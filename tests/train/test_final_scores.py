"""A finished run has its scores, whatever happens to what is added to them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.tiny_models import parsed
from vlm_tune.api import evaluate, sft
from vlm_tune.errors import DataError
from vlm_tune.evaluation import baseline_run
from vlm_tune.evaluation.baseline_run import Training
from vlm_tune.evaluation.metrics import Scores
from vlm_tune.resources import cache_folder
from vlm_tune.train import final_scores

QUICK: dict[str, Any] = {
    "train__steps": 1,
    "data__validation": [],
    "evaluate__samples": 0,
    "evaluate__max_new_tokens": 2,
}


def scored_recipe(tiny_recipe: Callable[..., str], rows: Path, **changes: Any) -> Any:
    test = [{"kind": "file", "path": str(rows)}]
    return parsed(tiny_recipe("causal"), data__test=test, **QUICK, **changes)


def test_scores_are_on_disk_before_baselines_which_may_fail(
    tiny_recipe: Callable[..., str], color_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = scored_recipe(tiny_recipe, color_rows, evaluate__baselines=["majority"])
    run = Path(recipe.output)
    accuracies = []

    def moved(*arguments: Any, **named: Any) -> Training:
        accuracies.append(json.loads((run / "result.json").read_text())["accuracy"])
        assert len((run / "answers.jsonl").read_text().splitlines()) == 8
        raise DataError("the source was changed meanwhile")

    monkeypatch.setattr(final_scores, "training_rows", moved)
    finished = sft(recipe)
    assert accuracies == [finished.result["accuracy"]]
    assert finished.result["metrics"]["exact_match"]["n"] == 8
    assert finished.result["notes"] == [
        "baselines from training rows are left out: the source was changed meanwhile"
    ]


def test_a_stop_during_baselines_ends_the_run_with_its_scores(
    tiny_recipe: Callable[..., str], color_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, progress: Callable[[int, int], None], **named: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        progress(1, 8)

    monkeypatch.setattr(baseline_run, "answer_rows", interrupted)
    recipe = scored_recipe(tiny_recipe, color_rows, evaluate__baselines=["majority", "blind"])
    finished = sft(recipe)
    assert finished.result["baselines"].keys() == {"majority"}
    assert finished.result["notes"] == ["baseline blind is left out: the run was asked to stop"]
    assert json.loads((finished.folder / "result.json").read_text()) == finished.result
    assert (finished.folder / "report.html").is_file()


@pytest.mark.parametrize(
    ("ranks", "sharded", "factor"), [(1, False, 1), (4, False, 4), (4, True, 1)]
)
def test_the_blind_model_answers_all_rows_on_one_rank(
    ranks: int,
    sharded: bool,
    factor: int,
    tiny_recipe: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = parsed(tiny_recipe("causal"))
    seconds = []

    class Noted:
        def __init__(self, model: Any, rows: Any, training: Any, settings: Any, *more: Any) -> None:
            seconds.append(more[0])

        def add(self, scores: Any, measured: Any) -> None:
            assert scores.n == 1

    monkeypatch.setattr(final_scores, "BaselineRun", Noted)
    monkeypatch.setattr(final_scores, "shards", lambda section: sharded)
    context: Any = SimpleNamespace(
        recipe=recipe,
        accelerator=SimpleNamespace(num_processes=ranks, autocast=nullcontext),
        section=None,
        caches=False,
    )
    model: Any = None
    final_scores._add_baselines(context, model, [], None, recipe, Scores(1.0, 1, None), [], 10.0)
    assert seconds == [10.0 * factor]


@pytest.mark.parametrize("shots", [0, 1])
def test_eval_prepares_no_training_rows_for_cheap_baselines(
    shots: int, tiny_recipe: Callable[..., str], color_rows: Path
) -> None:
    train = [{"kind": "file", "path": str(color_rows), "shots": shots}]
    recipe = parsed(tiny_recipe("causal"), **QUICK, data__train=train, data__max_length=256)
    run = sft(recipe)
    options: dict[str, Any] = {"data": color_rows, "limit": 2}
    assert "majority" in evaluate(run.folder, **options).baselines
    prepared = [path for path in cache_folder("prepared").iterdir() if path.is_dir()]
    for folder in prepared:
        (folder / "rows.arrow").unlink()
    scores = evaluate(run.folder, **options)
    assert scores.baselines.keys() == {"blind"}
    assert scores.notes == [
        "baselines from training rows are left out: the training part is not prepared in the "
        "cache; evaluate.baselines: [majority, ...] prepares it"
    ]
    assert not any((folder / "rows.arrow").exists() for folder in prepared)
    assert "majority" in evaluate(run.folder, **options, baselines=["majority"]).baselines
