"""A run's folder: made or refused before anything heavy is loaded, and never emptied without being told."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from vlm_tune.config import Recipe
from vlm_tune.errors import Problem, RecipeError
from vlm_tune.recipe import load_recipe
from vlm_tune.runlock import NAME as LOCK
from vlm_tune.runlock import check_lock

FILES = ("log.jsonl", "tuning.json", "samples.json", "answers.jsonl", "result.json", "report.html", "recipe.yaml")
FOLDERS = ("stages", "model")
"""What a run writes; starting anew removes these and nothing else."""
WRITTEN = ".recipe.yaml"
"""The recipe in the making: all that a start leaves that was killed before it became a run."""


def check_run(run: Path, recipe: Recipe, *, resume: bool, overwrite: bool, accept_changes: bool) -> None:
    """Raises `RecipeError` if the run can't be started or resumed in this folder, `TrainingError` if one is running there.

    Touches nothing.
    """
    check_lock(run)
    saved = run / "recipe.yaml"
    if resume:
        if not saved.is_file():
            raise RecipeError([Problem(str(run), "there is no run to resume here (no recipe.yaml)")])
        changed = [] if accept_changes else changes(saved, recipe)
        if changed:
            lines = [Problem(str(saved), f"the recipe differs from the run's: {line}") for line in changed]
            hint = "--resume goes on with the run's own recipe only, unless --accept-changes says that this is meant"
            raise RecipeError([*lines, Problem(str(saved), hint)])
    elif run.exists() and (not run.is_dir() or _holds_files(run)) and not (overwrite and saved.is_file()):
        hint = "--resume goes on with it, --overwrite starts anew" if saved.is_file() else "choose another output"
        raise RecipeError([Problem(str(run), f"the output folder is not empty; {hint}")])


def _holds_files(run: Path) -> bool:
    return any(path.name not in (LOCK, WRITTEN) for path in run.iterdir())


def changes(saved: Path, recipe: Recipe) -> list[str]:
    """What a recipe changes in a saved one: `dotted.name: old -> new`; its engine may be another, which computes the same."""
    old, new = (found.model_dump(exclude={"engine"}) for found in (load_recipe(saved), recipe))
    return [f"{name}: {before} -> {now}" for name, before, now in _differences(old, new, "")]


def open_run(run: Path, recipe: Recipe, text: str, *, resume: bool, overwrite: bool, accept_changes: bool) -> list[str]:
    """Makes the run's folder and writes the recipe; what of the recipe was changed. Raises as `check_run`."""
    check_run(run, recipe, resume=resume, overwrite=overwrite, accept_changes=accept_changes)
    changed = changes(run / "recipe.yaml", recipe) if resume else []
    if not resume:
        run.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (run / name).unlink(missing_ok=True)
        for name in FOLDERS:
            shutil.rmtree(run / name, ignore_errors=True)
    if changed or not resume:
        written = run / WRITTEN
        written.write_text(text)
        written.replace(run / "recipe.yaml")
    return [f"resumed with a changed recipe: {line}" for line in changed]


def _differences(old: Any, new: Any, name: str) -> list[tuple[str, Any, Any]]:
    """(dotted name, old, new) of every value that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [found for key in keys for found in _differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))]
    return [] if old == new else [(name, old, new)]
