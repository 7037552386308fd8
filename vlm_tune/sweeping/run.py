"""A sweep: trials train one recipe with different values, and the best one becomes a recipe."""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from vlm_tune.config.changes import recipe_changes
from vlm_tune.config.load import changed_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.errors import Interrupted, Problem, RecipeError, TrainingError
from vlm_tune.evaluation.registry import lower_is_better
from vlm_tune.events import Evaluation, Event, Note, Report, StageStart, TrialEnd, TrialStart
from vlm_tune.paths import check_writable, reason, shown_path
from vlm_tune.quoting import cut
from vlm_tune.run_folder import MARK, OUTPUT, RECIPE, remove_weights
from vlm_tune.run_lock import HOLDER, check_lock, run_lock
from vlm_tune.run_lock import NAME as LOCK
from vlm_tune.sweeping.records import (
    RECORD,
    TRIALS,
    Sweep,
    Trial,
    read_record,
    write_best,
    write_record,
    written_name,
)
from vlm_tune.sweeping.space import Space, check_space, space_differences
from vlm_tune.sweeping.study import JOURNAL, TrialStudy, check_installed
from vlm_tune.sweeping.trial_log import best_evaluation, evaluations
from vlm_tune.train.allocator import trim_heap
from vlm_tune.train.checkpoint import stage_folder
from vlm_tune.train.signals import stop_requests
from vlm_tune.train.step_trace import read_trace

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial
    from optuna.trial import Trial as OptunaTrial


class Train(Protocol):
    """Trains a trial's recipe, without scoring the test part, and reports each event."""

    def __call__(self, recipe: Recipe, /, *, resume: bool, show: Report) -> object: ...


@dataclass(frozen=True)
class Setting:
    """The trials that a sweep runs: a recipe, and the values that replace its own.

    Attributes:
        recipe: what the searched values change.
        space: the values of each searched key.
        folder: the sweep's.
        of: the number of trials.
        prune: whether a trial is stopped if its score is worse than the median of complete ones.
        keep_all: whether the models and checkpoints of ended trials stay, not the best one's alone.
    """

    recipe: Recipe
    space: Space
    folder: Path
    of: int
    prune: bool
    keep_all: bool

    @property
    def stage(self) -> int:
        """The number of the stage whose validation scores compare trials: the last."""
        return len(self.recipe.resolved_stages()) - 1

    @property
    def metric(self) -> str | None:
        """The metric, or `loss`, that the recipe selects by; None where the rows' form decides."""
        stage = self.recipe.last_stage
        selects_by = stage.objective.selects_by
        if selects_by != "answers":
            return selects_by
        return stage.evaluate.best or next(iter(stage.evaluate.metrics or ()), None)

    @property
    def lower_is_better(self) -> bool:
        """Whether the lowest score is the best; of the metrics that rows choose the highest is."""
        return self.metric is not None and lower_is_better(self.metric)


def run_sweep(
    setting: Setting,
    *,
    resume: bool,
    train: Train,
    write_report: Callable[[Sweep], object],
    show: Report,
) -> Sweep:
    """Runs trials until there are as many as the setting says; returns the sweep.

    The folder gets sweep.json, best.yaml and report.html, rewritten after each trial, and the
    trials' runs. A trial that runs out of memory, or whose loss is not finite, has failed.

    Args:
        setting: what to run.
        resume: continue the sweep in the folder; a trial that was interrupted comes first.
        train: trains a recipe in its output folder.
        write_report: writes the page of a sweep.
        show: called with every event of the sweep and of its trials.

    Raises:
        RecipeError: the recipe has no validation part, a searched value is none that it takes, or
            the folder can't be used.
        ModelError: optuna is not installed.
        TrainingError: no trial ended with a score, or one stopped for another reason.
        Interrupted: asked to stop; a checkpoint is written first.
        VlmTuneError: an error of a trial's data or model.
    """
    _check(setting, resume=resume)
    with stop_requests() as stop, _files(setting.folder), run_lock(setting.folder) as note:
        _check_folder(setting, resume=resume)
        if note is not None:
            show(Note(note))
        if not resume:
            write_record(_sweep(setting, []))
        study = TrialStudy(
            setting.folder,
            setting.space,
            setting.recipe.seed,
            lower_is_better=setting.lower_is_better,
            prune=setting.prune,
        )
        if resume:  # the process may have been killed before it wrote them
            _write(setting, study, write_report)
        _run_trials(setting, study, train, write_report, show, stop)
        sweep = _sweep(setting, study.trials())
    if sweep.best is None:
        reasons = "; ".join(f"trial {each.number}: {each.reason}" for each in sweep.trials[:3])
        raise TrainingError(f"none of {len(sweep.trials)} trials ended with a score: {reasons}")
    return sweep


def _run_trials(
    setting: Setting,
    study: TrialStudy,
    train: Train,
    write_report: Callable[[Sweep], object],
    show: Report,
    stop: Callable[[], bool],
) -> None:
    """Runs the trials that are left, and writes the sweep's files after each."""
    while True:
        trials = study.trials()
        unfinished = any(not each.state.is_finished() for each in trials)
        if len(trials) >= setting.of and not unfinished:
            break
        if stop():
            raise Interrupted(
                f"stopped after {len(trials)} of {setting.of} trials; continue with --resume"
            )
        trial = study.next_trial()
        if trial is None:
            show(Note(f"all {len(trials)} combinations of the searched values have been tried"))
            break
        write_record(_sweep(setting, study.trials()))
        seconds = _run_trial(setting, study, trial, train, show)
        _return_memory()
        sweep = _write(setting, study, write_report)
        show(_end(sweep, sweep.trials[trial.number], seconds))


def _write(setting: Setting, study: TrialStudy, write_report: Callable[[Sweep], object]) -> Sweep:
    """Writes the files of the sweep as it is now, and returns it."""
    sweep = _sweep(setting, study.trials())
    write_record(sweep)
    write_best(sweep)
    write_report(sweep)
    if not setting.keep_all:
        _remove_others(sweep)
    return sweep


def _remove_others(sweep: Sweep) -> None:
    """Removes the weights of the trials that ended, but the best one's; their scores stay."""
    for trial in sweep.trials:
        if trial.state != "running" and trial != sweep.best:
            remove_weights(Path(trial.folder))


# --- one trial ------------------------------------------------------------------------------------


class _Watch:
    """Takes the events of a trial's run: stores its validation scores, and stops it if it is bad.

    The log of the run has an event before it comes here.
    """

    def __init__(
        self, study: TrialStudy, trial: OptunaTrial, run: Path, stage: int, show: Report
    ) -> None:
        self.study = study
        self.trial = trial
        self.run = run
        self.stage = stage
        self.show = show
        self.steps = math.inf

    def __call__(self, event: Event) -> None:
        """Passes an event on. Raises optuna's `TrialPruned` after a bad score."""
        self.show(event)
        if isinstance(event, StageStart) and event.stage == self.stage:
            self.steps = event.steps
        if isinstance(event, Evaluation) and event.stage == self.stage:
            self._scored(event)

    def _scored(self, event: Evaluation) -> None:
        from optuna import TrialPruned

        if event.score is None or not math.isfinite(event.score):
            return
        # Trials are compared at their n-th validations: with other batch sizes these are at other
        # steps.
        count = len(evaluations(self.run, self.stage))
        self.study.report(self.trial, event.score, count)
        if event.step < self.steps and self.trial.should_prune():
            raise TrialPruned(f"worse than the median at validation {count}")


def _run_trial(
    setting: Setting, study: TrialStudy, trial: OptunaTrial, train: Train, show: Report
) -> float:
    """Runs a trial to its end, which the study stores; returns the seconds that it took.

    Raises what ends the sweep: `Interrupted`, and any error but those of `TrainingError.by_recipe`.
    """
    from optuna import TrialPruned

    number = trial.number + 1
    run = _run_folder(setting, number)
    recipe = changed_recipe(setting.recipe, trial.params | {"output": str(run)}, option="--search")
    resume = (run / MARK).is_file() and (run / RECIPE).is_file()
    show(TrialStart(number, setting.of, trial.params, resume))
    before = float(trial.user_attrs.get("seconds", 0.0))
    started = time.monotonic()
    state, why = "complete", ""
    try:
        train(recipe, resume=resume, show=_Watch(study, trial, run, setting.stage, show))
    except TrialPruned as error:
        state, why = "pruned", str(error)
    except TrainingError as error:
        if not error.by_recipe:
            raise
        state, why = "failed", cut(str(error).partition(";")[0])
    except Interrupted as error:
        trial.set_user_attr("seconds", before + time.monotonic() - started)
        raise Interrupted(f"trial {number} {error}") from error
    seconds = before + time.monotonic() - started
    facts = _facts(setting, run, complete=state == "complete")
    if state == "complete" and facts.get("score") is None:
        state, why = "failed", "no validation score is finite"
    facts |= {"seconds": round(seconds, 2), "reason": why}
    study.finish(trial, state, facts.get("score"), facts)
    return seconds


def _run_folder(setting: Setting, number: int) -> Path:
    """The folder of a trial's run."""
    return setting.folder / TRIALS / str(number)


def _facts(setting: Setting, run: Path, *, complete: bool) -> dict[str, Any]:
    """The score of a trial's run, the metric and step that it is of, and the steps taken."""
    stage = stage_folder(run, setting.stage, setting.recipe.resolved_stages()[-1][0])
    if complete:
        done = json.loads((stage / "done.json").read_text())
        facts = {"score": "best_score", "metric": "best_by", "step": "best_step", "steps": "step"}
        return {fact: done[key] for fact, key in facts.items()}
    facts: dict[str, Any] = {"steps": max((each.step for each in read_trace(stage)), default=0)}
    best = best_evaluation(evaluations(run, setting.stage))
    if best is None:
        return facts
    return facts | {"score": best.score, "metric": best.best_by, "step": best.step}


def _return_memory() -> None:
    """Frees what a trial's model took: it is part of reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_heap()


# --- records --------------------------------------------------------------------------------------


def _sweep(setting: Setting, trials: list[FrozenTrial]) -> Sweep:
    """The sweep with the trials that have begun."""
    metrics = [each.user_attrs["metric"] for each in trials if "metric" in each.user_attrs]
    return Sweep(
        setting.folder,
        setting.recipe,
        setting.space,
        next(iter(metrics), setting.metric),
        setting.lower_is_better,
        [_record(setting, each) for each in trials],
        setting.of,
    )


def _record(setting: Setting, trial: FrozenTrial) -> Trial:
    """A trial as the study has it."""
    states = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
    facts = ("score", "step", "steps", "seconds", "reason")
    return Trial(
        trial.number + 1,
        str(_run_folder(setting, trial.number + 1)),
        trial.params,
        states.get(trial.state.name, "running"),
        **{name: trial.user_attrs[name] for name in facts if name in trial.user_attrs},
    )


def _end(sweep: Sweep, trial: Trial, seconds: float) -> TrialEnd:
    """The event of a trial that has ended."""
    best = sweep.best
    return TrialEnd(
        number=trial.number,
        of=sweep.of,
        state=trial.state,
        seconds=seconds,
        metric=sweep.metric,
        score=trial.score,
        step=trial.step,
        reason=trial.reason,
        best=None if best is None else best.number,
        best_score=None if best is None else best.score,
    )


# --- checks ---------------------------------------------------------------------------------------


def _check(setting: Setting, *, resume: bool) -> None:
    """Checks what can be checked before the first trial; changes nothing. Raises as `run_sweep`."""
    check_installed()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainingError("a sweep runs its trials in one process; start it without torchrun")
    data = setting.recipe.last_stage.data
    if not data.validation and not (data.split and data.split.validation):
        message = (
            "a sweep selects by validation scores, and this recipe has no validation part; give "
            "data.validation, or hold rows out with data.split.validation"
        )
        raise RecipeError([Problem(setting.recipe.where(("data",)), message)])
    check_space(setting.recipe, setting.space)
    check_writable(setting.folder, OUTPUT, folder=True)
    check_lock(setting.folder)
    _check_folder(setting, resume=resume)


@contextmanager
def _files(folder: Path) -> Iterator[None]:
    """Context in which a file of the folder that can't be read or written is a `TrainingError`."""
    try:
        yield
    except OSError as error:
        inside = error.filename is not None and Path(str(error.filename)).is_relative_to(folder)
        if not inside and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        message = f"{error.filename or folder}: {reason(error)}; fix that, and --resume continues"
        raise TrainingError(message) from error


def _check_folder(setting: Setting, *, resume: bool) -> None:
    """Raises `RecipeError` unless the folder is empty, or has this sweep where it is resumed."""
    folder = setting.folder
    if not resume:
        ours = {LOCK, HOLDER, written_name(RECORD)}
        if folder.is_dir() and any(path.name not in ours for path in folder.iterdir()):
            hint = (
                "--resume continues with the sweep"
                if (folder / RECORD).is_file()
                else "nothing in it is deleted; choose another --output"
            )
            message = f"the output folder is not empty; {hint}"
            raise RecipeError([Problem(shown_path(folder), message)])
        return
    recipe, space = read_record(folder)
    changes = [
        *(f"the recipe differs from the sweep's: {line}" for line in _changes(recipe, setting)),
        *(
            f"the search differs from the sweep's: {line}"
            for line in space_differences(space, setting.space)
        ),
    ]
    if changes:
        where = shown_path(folder / RECORD)
        hint = "--resume needs the sweep's own recipe and search; start another sweep for others"
        raise RecipeError([Problem(where, line) for line in [*changes, hint]])
    if any((folder / TRIALS).glob("*")) and not (folder / JOURNAL).is_file():
        message = f"the sweep can't be resumed: its {JOURNAL} is gone; start another sweep"
        raise RecipeError([Problem(shown_path(folder), message)])


def _changes(recipe: Recipe, setting: Setting) -> list[str]:
    """Lines on the values that differ between a sweep's recipe and the one that it resumes with."""
    return [str(change) for change in recipe_changes(recipe, setting.recipe)]
