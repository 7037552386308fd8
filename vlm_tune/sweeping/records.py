"""The record of a sweep: its trials, sweep.json, and the recipe of the best trial."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlm_tune.config.load import changed_recipe, dump_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.errors import Problem, RecipeError
from vlm_tune.paths import shown_path
from vlm_tune.quoting import reason_of
from vlm_tune.sweeping.space import Scalar, Space, parse_search

RECORD = "sweep.json"
BEST = "best.yaml"
REPORT = "report.html"
TRIALS = "trials"
"""The files of a sweep's folder, and the folder of its trials."""


@dataclass(frozen=True)
class Trial:
    """A trial of a sweep.

    Attributes:
        number: from 1.
        folder: that of its run.
        values: of the searched keys, by their dotted names.
        state: complete, pruned, failed, or running, also if the process is gone.
        score: the best validation score; None where there was none.
        step: the optimizer step that it is of.
        steps: the optimizer steps taken, of the last stage.
        seconds: the time that it took, without that before its process was killed.
        reason: why it was pruned, or failed; else empty.
    """

    number: int
    folder: str
    values: Mapping[str, Scalar]
    state: str
    score: float | None = None
    step: int | None = None
    steps: int = 0
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Sweep:
    """A sweep: its folder, the base of its recipes, what it searches, and its trials.

    Attributes:
        folder: with sweep.json, best.yaml, report.html and the trials' runs.
        recipe: what the searched values change.
        space: the values of each searched key.
        metric: what trials are compared by; None before the first score.
        lower_is_better: whether the lowest score is the best.
        trials: those that have begun, by number.
        of: the number of trials to run.
    """

    folder: Path
    recipe: Recipe
    space: Space
    metric: str | None
    lower_is_better: bool
    trials: list[Trial]
    of: int

    @property
    def best(self) -> Trial | None:
        """The complete trial with the best score, the first of equal ones; None if none is."""
        complete = [trial for trial in self.ranked if trial.state == "complete"]
        return complete[0] if complete else None

    @property
    def ranked(self) -> list[Trial]:
        """The trials by score, the best first; those without a score last."""
        sign = 1 if self.lower_is_better else -1

        def place(trial: Trial) -> tuple[bool, float]:
            return trial.score is None, 0.0 if trial.score is None else sign * trial.score

        return sorted(self.trials, key=place)

    def summary(self) -> dict[str, Any]:
        """The sweep as JSON."""
        best = self.best
        return {
            "metric": self.metric,
            "lower_is_better": self.lower_is_better,
            "of": self.of,
            "best": None if best is None else best.number,
            "trials": [asdict(trial) for trial in self.trials],
            "search": {key: dimension.written for key, dimension in self.space.items()},
            "recipe": self.recipe.model_dump(mode="json", exclude_unset=True),
        }


def write_record(sweep: Sweep) -> None:
    """Writes sweep.json."""
    _replace(sweep.folder / RECORD, json.dumps(sweep.summary(), indent=1))


def write_best(sweep: Sweep) -> None:
    """Writes best.yaml, where a trial is complete."""
    if sweep.best is not None:
        _replace(sweep.folder / BEST, best_text(sweep, sweep.best))


def written_name(name: str) -> str:
    """The name of a file while it is being written."""
    return f".{name}"


def _replace(path: Path, text: str) -> None:
    """Writes a file whole: whoever reads it sees the old text or the new one."""
    written = path.with_name(written_name(path.name))
    written.write_text(text, encoding="utf-8")
    written.replace(path)


def best_text(sweep: Sweep, trial: Trial) -> str:
    """The recipe with the values of a trial, after comments on where they are from."""
    recipe = changed_recipe(sweep.recipe, trial.values)
    lines = [
        f"The best of {len(sweep.trials)} trials: trial {trial.number}, with a validation "
        f"{sweep.metric} of {trial.score:.6g} after step {trial.step}.",
        *(f"{key}: {json.dumps(value)}" for key, value in trial.values.items()),
    ]
    return "".join(f"# {line}\n" for line in lines) + dump_recipe(recipe)


def read_record(folder: Path) -> tuple[Recipe, Space]:
    """The recipe and the search space of the sweep in a folder.

    Raises `RecipeError` where there is none that can be read.
    """
    path = folder / RECORD
    if not path.is_file():
        message = f"there is no sweep to resume here (no {RECORD})"
        raise RecipeError([Problem(shown_path(folder), message)])
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        return Recipe.model_validate(summary["recipe"]), parse_search(summary["search"])
    except (OSError, ValueError, KeyError, TypeError, RecipeError) as error:
        message = f"the sweep can't be resumed: this file can't be read ({reason_of(error)})"
        raise RecipeError([Problem(shown_path(path), message)]) from error
