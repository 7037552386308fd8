"""A run's folder: made or refused before anything heavy is loaded, and never emptied without being told."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from vlm_tune.config import Recipe
from vlm_tune.errors import Problem, RecipeError
from vlm_tune.recipe import load_recipe

FILES = ("log.jsonl", "tuning.json", "samples.json", "answers.jsonl", "result.json", "report.html", "recipe.yaml")
FOLDERS = ("stages", "model")
"""What a run writes; starting anew removes these and nothing else."""


def check_run(run: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Raises `RecipeError` if the run can't be started or resumed in this folder; touches nothing."""
    saved = run / "recipe.yaml"
    if resume:
        if not saved.is_file():
            raise RecipeError([Problem(str(run), "there is no run to resume here (no recipe.yaml)")])
        # A run may go on under another engine: its checkpoints are whole, and what is computed stays the same.
        before, now = load_recipe(saved).model_dump(exclude={"engine"}), recipe.model_dump(exclude={"engine"})
        changed = [f"{name}: {old} -> {new}" for name, old, new in _differences(before, now, "")]
        if changed:
            raise RecipeError([Problem(str(saved), f"the recipe differs from the run's: {line}") for line in changed])
    elif run.exists() and (not run.is_dir() or any(run.iterdir())) and not (overwrite and saved.is_file()):
        hint = "--resume goes on with it, --overwrite starts anew" if saved.is_file() else "choose another output"
        raise RecipeError([Problem(str(run), f"the output folder is not empty; {hint}")])


def open_run(run: Path, recipe: Recipe, text: str, *, resume: bool, overwrite: bool) -> None:
    """Makes the run's folder and writes the recipe. Raises `RecipeError` as `check_run`."""
    check_run(run, recipe, resume=resume, overwrite=overwrite)
    if resume:
        return
    run.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (run / name).unlink(missing_ok=True)
    for name in FOLDERS:
        shutil.rmtree(run / name, ignore_errors=True)
    (run / "recipe.yaml").write_text(text)


def _differences(old: Any, new: Any, name: str) -> list[tuple[str, Any, Any]]:
    """(dotted name, old, new) of every value that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [found for key in keys for found in _differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))]
    return [] if old == new else [(name, old, new)]
