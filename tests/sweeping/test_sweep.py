"""Sweeps over runs whose scores a formula gives: choice, pruning, faults, resuming, refusals."""

from __future__ import annotations

import builtins
import errno
import gc
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.formula_runs import FormulaRuns, formula_sweep, write_formula_recipe
from vlm_tune.config.load import load_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.errors import DataError, Interrupted, ModelError, RecipeError, TrainingError
from vlm_tune.events import Event, Note, TrialEnd, TrialStart
from vlm_tune.run_lock import run_lock
from vlm_tune.sweeping.records import Sweep
from vlm_tune.train.checkpoint import stage_folder, step_folder

RATE = "train.learning_rate"
SEARCH = {RATE: "log:1e-5..1e-1", "tune.1.r": "8,16,32", "train.batch_size": "1..4"}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_formula_recipe(tmp_path)


def nearness(recipe: Recipe, count: int) -> float:
    """A score that rises with each validation, and is best at a learning rate of 0.001."""
    return count / 10 - abs(math.log10(recipe.train.learning_rate) + 3) / 10


def values(sweep: Sweep) -> list[dict[str, Any]]:
    return [dict(trial.values) for trial in sweep.trials]


@pytest.fixture(autouse=True)
def nothing_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without syncing the journal to the disk, and collecting the garbage of models."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(gc, "collect", lambda: 0)


def test_the_best_trial_is_the_one_with_the_best_validation_score(recipe: Path) -> None:
    sweep = formula_sweep(recipe, SEARCH, FormulaRuns(nearness))
    complete = [trial for trial in sweep.trials if trial.state == "complete"]
    nearest = min(complete, key=lambda trial: abs(math.log10(float(trial.values[RATE])) + 3))
    assert sweep.best == nearest and sweep.metric == "exact_match"
    assert [trial.number for trial in sweep.trials] == list(range(1, 9))
    assert (nearest.step, nearest.steps) == (30, 30)
    scores = [trial.score for trial in sweep.ranked]
    assert scores == sorted(scores, reverse=True)
    best = load_recipe(sweep.folder / "best.yaml")
    assert best.train.learning_rate == nearest.values[RATE]
    assert best.output == load_recipe(recipe).output
    text = (sweep.folder / "best.yaml").read_text()
    assert text.startswith(f"# The best of 8 trials: trial {nearest.number}, with a validation ")
    assert json.loads((sweep.folder / "sweep.json").read_text())["best"] == nearest.number


@pytest.mark.parametrize("keep_all", [False, True])
def test_the_weights_of_the_best_trial_stay_and_those_of_others_if_that_is_wanted(
    recipe: Path, keep_all: bool
) -> None:
    events: list[Event] = []
    runs = FormulaRuns(nearness, {4: Interrupted("stopped; --resume")})

    def stay() -> list[int]:
        trials = recipe.parent / "sweep" / "trials"
        weights = {path.relative_to(trials).parts[0] for path in trials.rglob("weights")}
        return sorted(map(int, weights))

    def noted(event: Event) -> None:
        events.append(event)
        if isinstance(event, TrialEnd) and not keep_all:
            assert stay() == [event.best]

    with pytest.raises(Interrupted):
        formula_sweep(recipe, SEARCH, runs, of=6, prune=False, keep_all=keep_all, show=noted)
    # The checkpoint from which the interrupted trial goes on.
    checkpoint = step_folder(stage_folder(recipe.parent / "sweep/trials/4", 0, "main"), 10)
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").touch()
    (checkpoint / "manifest.json").write_text(json.dumps({"files": {"weights": {}}}))
    noted_at_resume: list[list[int]] = []
    sweep = formula_sweep(
        recipe,
        SEARCH,
        FormulaRuns(nearness),
        of=6,
        prune=False,
        keep_all=keep_all,
        resume=True,
        show=lambda event: noted_at_resume.append(stay()),
    )
    assert 4 in noted_at_resume[0]
    assert sweep.best is not None
    assert stay() == (list(range(1, 7)) if keep_all else [sweep.best.number])
    assert all((Path(trial.folder) / "log.jsonl").is_file() for trial in sweep.trials)


def test_the_lowest_loss_is_the_best(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("{every: 10}", "{every: 10, best: loss}"))
    sweep = formula_sweep(recipe, SEARCH, FormulaRuns(lambda r, n: r.train.learning_rate), of=5)
    assert sweep.metric == "loss" and sweep.best is not None
    assert sweep.best.values[RATE] == min(float(each[RATE]) for each in values(sweep))


def test_a_trial_under_the_median_is_pruned_unless_that_is_off(recipe: Path) -> None:
    def falling(recipe: Recipe, count: int) -> float:
        """Trials that score less than all before them, from the sixth on."""
        return 1.0 - int(Path(recipe.output).name) / 10

    sweep = formula_sweep(recipe, SEARCH, FormulaRuns(falling), of=7)
    assert [trial.state for trial in sweep.trials] == ["complete"] * 5 + ["pruned"] * 2
    last = sweep.trials[-1]
    assert (last.score, last.step, last.steps) == (pytest.approx(0.3), 10, 10)
    assert last.reason == "worse than the median at validation 1"
    other = recipe.parent / "unpruned"
    other.mkdir()
    runs = FormulaRuns(falling)
    whole = formula_sweep(write_formula_recipe(other), SEARCH, runs, of=7, prune=False)
    assert {trial.state for trial in whole.trials} == {"complete"}


def test_trials_are_compared_at_their_n_th_validation(recipe: Path) -> None:
    """A score that rises with each validation is not compared with later ones of others."""
    sweep = formula_sweep(recipe, SEARCH, FormulaRuns(lambda recipe, count: count / 10), of=8)
    assert {trial.state for trial in sweep.trials} == {"complete"}


def test_a_trial_that_its_values_break_has_failed_and_the_sweep_goes_on(recipe: Path) -> None:
    fault = TrainingError("the loss is nan at step 12; the batch holds row 7", by_recipe=True)
    events: list[Event] = []
    runs = FormulaRuns(nearness, {2: fault})
    sweep = formula_sweep(recipe, SEARCH, runs, of=3, show=events.append)
    assert [trial.state for trial in sweep.trials] == ["complete", "failed", "complete"]
    assert sweep.trials[1].reason == "the loss is nan at step 12"
    ends = [event for event in events if isinstance(event, TrialEnd)]
    assert [(end.number, end.state) for end in ends] == [
        (1, "complete"),
        (2, "failed"),
        (3, "complete"),
    ]
    assert ends[1].reason == "the loss is nan at step 12" and ends[1].best == 1


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_trial_without_a_finite_score_has_failed(recipe: Path, score: float) -> None:
    runs = FormulaRuns(lambda recipe, count: score)
    with pytest.raises(TrainingError, match="none of 2 trials ended with a score: trial 1: no val"):
        formula_sweep(recipe, SEARCH, runs, of=2)
    summary = json.loads((recipe.parent / "sweep" / "sweep.json").read_text())
    assert [trial["state"] for trial in summary["trials"]] == ["failed", "failed"]
    assert summary["best"] is None and not (recipe.parent / "sweep" / "best.yaml").exists()


@pytest.mark.parametrize(
    "fault", [TrainingError("no room"), DataError("a bad row"), RecipeError([]), ModelError("no")]
)
def test_any_other_error_ends_the_sweep(recipe: Path, fault: Exception) -> None:
    with pytest.raises(type(fault)):
        formula_sweep(recipe, SEARCH, FormulaRuns(nearness, {2: fault}))
    summary = json.loads((recipe.parent / "sweep" / "sweep.json").read_text())
    assert [trial["state"] for trial in summary["trials"]] == ["complete", "running"]


def test_a_sweep_that_was_killed_goes_on_as_it_would_have(recipe: Path, tmp_path: Path) -> None:
    """With TPE, which takes its values from the scores so far from the eleventh trial on."""
    whole = formula_sweep(recipe, SEARCH, FormulaRuns(nearness), of=14)
    (tmp_path / "cut").mkdir()
    again = write_formula_recipe(tmp_path / "cut")
    runs = FormulaRuns(nearness, {3: SystemExit(9), 12: Interrupted("stopped; --resume")})
    with pytest.raises(SystemExit):
        formula_sweep(again, SEARCH, runs, of=14)
    journal = again.parent / "sweep" / "journal.jsonl"
    with journal.open("a") as file:  # the process was killed as it wrote
        file.write('{"op_code": 7, "wor')
    events: list[Event] = []
    with pytest.raises(Interrupted, match="trial 12 stopped"):
        formula_sweep(again, SEARCH, runs, of=14, resume=True, show=events.append)
    starts = [event for event in events if isinstance(event, TrialStart)]
    assert (starts[0].number, starts[0].resumed) == (3, True)
    cut = formula_sweep(again, SEARCH, runs, of=14, resume=True)
    assert values(cut) == values(whole)
    assert [(each.state, each.score) for each in cut.trials] == [
        (each.state, each.score) for each in whole.trials
    ]
    assert [int(Path(run.output).name) for run, resumed in runs.runs if resumed] == [3, 12]


def test_a_finished_sweep_takes_more_trials(recipe: Path) -> None:
    first = formula_sweep(recipe, SEARCH, FormulaRuns(nearness), of=2)
    runs = FormulaRuns(nearness)
    more = formula_sweep(recipe, SEARCH, runs, of=4, resume=True)
    assert more.trials[:2] == first.trials and len(more.trials) == 4 and len(runs.runs) == 2


def test_no_combination_comes_twice_and_the_sweep_ends_with_the_last(recipe: Path) -> None:
    events: list[Event] = []
    search = {"tune.1.r": "8,16", "train.batch_size": "1..2"}
    sweep = formula_sweep(recipe, search, FormulaRuns(nearness), of=9, show=events.append)
    tried = {tuple(each.values()) for each in values(sweep)}
    assert tried == {(8, 1), (8, 2), (16, 1), (16, 2)} and len(sweep.trials) == 4
    notes = [event.text for event in events if isinstance(event, Note)]
    assert notes == ["all 4 combinations of the searched values have been tried"]


def refusal(recipe: Path, search: dict[str, Any], **options: Any) -> str:
    with pytest.raises(RecipeError) as error:
        formula_sweep(recipe, search, FormulaRuns(nearness), of=1, **options)
    return str(error.value)


def test_another_search_or_recipe_is_refused_with_the_difference(recipe: Path) -> None:
    formula_sweep(recipe, SEARCH, FormulaRuns(nearness), of=1)
    other = refusal(recipe, SEARCH | {RATE: "log:1e-5..1e-2"}, resume=True)
    assert 'search differs from the sweep\'s: train.learning_rate: "log:1e-05..0.1" -> ' in other
    recipe.write_text(recipe.read_text().replace("steps: 30", "steps: 40"))
    assert "differs from the sweep's: train.steps: 30 -> 40" in refusal(recipe, SEARCH, resume=True)


def test_only_an_empty_folder_takes_a_new_sweep_and_only_a_sweep_is_resumed(recipe: Path) -> None:
    assert "there is no sweep to resume here" in refusal(recipe, SEARCH, resume=True)
    formula_sweep(recipe, SEARCH, FormulaRuns(nearness), of=1)
    assert "not empty; --resume continues with the sweep" in refusal(recipe, SEARCH)
    folder = recipe.parent / "sweep"
    (folder / "journal.jsonl").write_text('{"op_code": 99}\n{}\n')
    assert "the sweep's journal can't be read" in refusal(recipe, SEARCH, resume=True)
    (folder / "journal.jsonl").unlink()
    assert "its journal.jsonl is gone" in refusal(recipe, SEARCH, resume=True)
    (folder / "sweep.json").write_text("{")
    assert "the sweep can't be resumed: this file" in refusal(recipe, SEARCH, resume=True)
    (folder / "sweep.json").unlink()
    assert "not empty; nothing in it is deleted" in refusal(recipe, SEARCH)


def test_the_folder_is_locked_while_the_sweep_runs(recipe: Path) -> None:
    with run_lock(recipe.parent / "sweep"), pytest.raises(TrainingError, match="in use by"):
        formula_sweep(recipe, SEARCH, FormulaRuns(nearness))
    assert formula_sweep(recipe, SEARCH, FormulaRuns(nearness), of=1).best is not None


def test_a_full_disk_ends_the_sweep_with_what_to_do_and_it_goes_on(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = recipe.parent / "sweep"

    def full(sweep: Sweep) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "best.yaml"))

    with monkeypatch.context() as patched:
        patched.setattr("vlm_tune.sweeping.run.write_best", full)
        with pytest.raises(TrainingError, match="no space left on device: make room; fix"):
            formula_sweep(recipe, SEARCH, FormulaRuns(nearness), of=1)
    sweep = formula_sweep(recipe, SEARCH, FormulaRuns(nearness), of=1, resume=True)
    assert sweep.best is not None and (folder / "best.yaml").is_file()


def test_a_recipe_without_validation_rows_is_refused(recipe: Path) -> None:
    text = recipe.read_text()
    line = "  validation: [{kind: file, path: rows.jsonl}]\n"
    recipe.write_text(text.replace(line, ""))
    message = refusal(recipe, SEARCH)
    assert "recipe.yaml:9:1: a sweep selects by validation scores" in message
    assert not (recipe.parent / "sweep").exists()
    recipe.write_text(text.replace(line, "  split: {validation: 0.2}\n"))
    assert formula_sweep(recipe, SEARCH, FormulaRuns(nearness), of=1).best is not None


def test_several_processes_and_a_missing_optuna_are_errors(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="in one process"):
        formula_sweep(recipe, SEARCH, FormulaRuns(nearness))
    imported = builtins.__import__

    def without_optuna(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "optuna":
            raise ImportError(name)
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_optuna)
    with pytest.raises(ModelError, match=r"pip install 'vlm_tune\[sweep\]'"):
        formula_sweep(recipe, SEARCH, FormulaRuns(nearness))
