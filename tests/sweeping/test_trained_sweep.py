"""Sweeps that train: the better learning rate wins, a bad run is stopped, an interrupt resumes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import vlm_tune
from tests.helpers.formula_runs import FormulaRuns, formula_sweep
from tests.helpers.html_page import Page, assert_harmless
from tests.helpers.tiny_models import cli
from tests.helpers.tiny_recipes import tiny_text, write_color_rows
from vlm_tune.api.training import train_by
from vlm_tune.config.recipe import Recipe
from vlm_tune.errors import Interrupted
from vlm_tune.events import Evaluation, Event, Report
from vlm_tune.sweeping.records import Sweep
from vlm_tune.train.checkpoint import stage_folder

SEARCH = {"train.learning_rate": [1e-6, 3e-2]}
SHORT = [
    "evaluate.best=loss",
    "evaluate.every=2",
    "evaluate.samples=0",
    "evaluate.max_new_tokens=1",
    "evaluate.baselines=[]",
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    path = folder / "recipe.yaml"
    path.write_text(tiny_text("causal", write_color_rows(folder), folder / "run"))
    return path


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Sweep:
    return vlm_tune.sweep(recipe, SHORT, search=SEARCH, trials=2)


def test_the_better_learning_rate_is_chosen(whole: Sweep, recipe: Path) -> None:
    assert whole.folder == recipe.parent / "run-sweep"
    assert {trial.values["train.learning_rate"] for trial in whole.trials} == {1e-6, 3e-2}
    assert whole.best is not None and whole.best.values["train.learning_rate"] == 3e-2
    assert [trial.steps for trial in whole.trials] == [4, 4]
    best = vlm_tune.load_recipe(whole.folder / "best.yaml")
    assert best.train.learning_rate == 3e-2 and best.output == str(recipe.parent / "run")
    # Each trial is a run that other commands take; its test part, were there one, is not scored.
    run = Path(whole.best.folder)
    assert (run / "model").is_dir() and (run / "report.html").is_file()
    page = Page((whole.folder / "report.html").read_text(encoding="utf-8"))
    assert_harmless(page)
    assert f"{whole.best.number} (best)" in page.words


def test_an_interrupted_sweep_goes_on_from_the_checkpoint(whole: Sweep, recipe: Path) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, Evaluation) and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = recipe.parent / "interrupted"
    options = {"search": SEARCH, "trials": 2, "output": folder}
    try:
        with pytest.raises(Interrupted, match="trial 1 stopped at step 2 of 4"):
            vlm_tune.sweep(recipe, SHORT, **options, show=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    events: list[Event] = []
    resumed = vlm_tune.sweep(recipe, SHORT, **options, resume=True, show=events.append)
    steps = [event.step for event in events if isinstance(event, Evaluation)]
    assert steps == [4, 2, 4]
    assert [(each.values, each.score, each.state) for each in resumed.trials] == [
        (each.values, each.score, each.state) for each in whole.trials
    ]


def test_a_bad_run_is_stopped_at_its_validation_and_leaves_its_folder(recipe: Path) -> None:
    """After five trials by a formula; the sixth trains."""
    formula = FormulaRuns(lambda recipe, count: 0.1)

    class LastTrains(FormulaRuns):
        def __call__(self, recipe: Recipe, /, *, resume: bool, show: Report) -> None:
            if Path(recipe.output).name != "6":
                return formula(recipe, resume=resume, show=show)
            train_by("sft", recipe, resume=resume, test=False, show=show)
            return None

    changed = recipe.parent / "changed.yaml"
    text = recipe.read_text().replace("samples: 2", "samples: 0, every: 2, best: loss")
    changed.write_text(text)
    search = {"train.learning_rate": "log:1e-6..1e-5"}
    sweep = formula_sweep(changed, search, LastTrains(lambda recipe, count: 0.1), of=6)
    last = sweep.trials[-1]
    assert (last.state, last.steps, last.step) == ("pruned", 2, 2)
    assert last.score is not None and last.score > 1
    run = Path(last.folder)
    assert not (run / "run.lock").exists() and not (run / "result.json").exists()
    assert not (stage_folder(run, 0, "main") / "done.json").exists()


def test_the_command_line_names_what_is_wrong_before_it_trains(recipe: Path) -> None:
    rate = "--search=train.learning_rate"
    for arguments, message in (
        ([rate], "a search is written KEY=VALUES"),
        ([f"{rate}=1e-5,1e-4", f"{rate}=1,2"], "is searched twice"),
        ([f"{rate}=1e-5..x"], "expected two values or more"),
        (["--search=train.learnin_rate=1,2"], "did you mean learning_rate?"),
        ([f"{rate}=1,2", "--resume"], "no sweep to resume here"),
    ):
        words = cli(
            "sweep", str(recipe), *arguments, f"--output={recipe.parent / 'none'}", "--json", code=2
        )
        assert message in words
    assert not (recipe.parent / "none").exists()
