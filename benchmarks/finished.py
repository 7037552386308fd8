"""Runs of comparisons, which a command that was stopped need not train again."""

from __future__ import annotations

from pathlib import Path

from vlm_tune.config.load import load_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.run_folder import RECIPE


def finished_run(recipe: Recipe, command: str = "sft") -> Path:
    """The folder of a recipe's finished run.

    Trains it, unless a run with the same recipe has ended there.

    Args:
        recipe: The recipe, with the run's folder as its output.
        command: The command that trains it: sft, dpo, kto or grpo.
    """
    folder = Path(recipe.output)
    if (folder / "result.json").is_file() and load_recipe(folder / RECIPE) == recipe:
        return folder
    from vlm_tune.api.training import train_by

    return train_by(command, recipe, overwrite=True).folder
