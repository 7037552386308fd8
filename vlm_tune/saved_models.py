"""The saved model, the run and the recipe that a path stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm_tune.config.changes import recipe_changes
from vlm_tune.config.load import load_recipe
from vlm_tune.errors import ModelError, Problem, RecipeError
from vlm_tune.model.checkpoint import find_model
from vlm_tune.model.hub import read_json
from vlm_tune.paths import is_folder, shown_path
from vlm_tune.run_folder import finished_stages, recipe_above


def find_recipe(model: Path) -> Path:
    """Finds the recipe of the run that a model folder lies in.

    Raises:
        ModelError: the folder does not exist.
        RecipeError: neither the folder nor one above it holds a recipe.
    """
    if not is_folder(model):
        raise ModelError(f"no such folder: {shown_path(model)}")
    recipe = recipe_above(model)
    if recipe is None:
        message = "no recipe.yaml in this folder or above it; name one with --recipe"
        raise RecipeError([Problem(shown_path(model), message)])
    return recipe


def recipe_differences(first: Path | None, second: Path | None) -> list[str] | None:
    """The values that the second recipe changes in the first, one a line.

    The name and output folder are left out. Returns None where a recipe is missing or can't be
    read.
    """
    if first is None or second is None:
        return None
    try:
        changes = recipe_changes(load_recipe(first), load_recipe(second))
    except RecipeError:
        return None
    return [str(change) for change in changes if change.name not in ("name", "output")]


def which_model(path: str | Path) -> dict[str, Any]:
    """Finds the saved model that a path stands for and describes it.

    Returns:
        `folder`, `about` (a description in words), `stage`, `step` and `run`; the last three are
        None where they are unknown.

    Raises:
        ModelError: there is no model.
    """
    folder = find_model(Path(path))
    above = folder.resolve()
    if above.parent.name == "checkpoints":
        stage = above.parent.parent.name
        step = above.name.removeprefix("step-")
        run = above.parent.parent.parent.parent
        text = f"the checkpoint of step {step} of stage {stage}"
        if above != Path(path).resolve():
            text += ", the last complete one: the run has no finished model yet"
        return {
            "folder": str(folder),
            "about": text,
            "stage": stage,
            "step": int(step) if step.isdecimal() else None,
            "run": str(run),
        }
    stages = finished_stages(above)
    if not stages:
        return {
            "folder": str(folder),
            "about": "a model folder",
            "stage": None,
            "step": None,
            "run": None,
        }
    done = read_json(stages[-1])
    step = done.get("step")
    best = done.get("best_step")
    stage = stages[-1].parent.name
    which = (
        f"the best checkpoint, step {best},"
        if best not in (None, step)
        else f"the last step, {step},"
    )
    return {
        "folder": str(folder),
        "about": f"the finished model: {which} of stage {stage}",
        "stage": stage,
        "step": best or step,
        "run": str(above.parent),
    }
