"""Training by Python: `sft`, `dpo`, `kto` and `grpo`."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from vlm_tune.config.load import as_recipe, check_command
from vlm_tune.config.recipe import Recipe
from vlm_tune.errors import TrainingError
from vlm_tune.events import Report
from vlm_tune.rendering.report import write_report
from vlm_tune.train.out_of_memory import is_out_of_memory, out_of_memory
from vlm_tune.train.run import Run
from vlm_tune.train.run import sft as run_recipe


def sft(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] | dict[str, Any] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
    accept_changes: bool = False,
    test: bool = True,
    show: Report | None = None,
) -> Run:
    """Trains a recipe and returns the run.

    Args:
        recipe: a recipe file, or a loaded recipe.
        overrides: `"a.b=c"` strings, or a mapping of dotted names to values; not with a loaded
            recipe.
        resume: continue the run in the output folder from its last checkpoint. The recipe must be
            the run's own, unless `accept_changes` is set.
        overwrite: start over and delete what a run wrote to the output folder.
        accept_changes: with `resume`, continue with this recipe though it differs from the run's.
        test: score the test part at the end.
        show: called with every event.

    Returns:
        The run: its folder, result and model.

    Raises:
        VlmTuneError: an error of `vlm_tune.errors`: a bad recipe, bad data or weights, or training
            that stopped.
    """
    return train_by(
        "sft",
        as_recipe(recipe, overrides),
        resume=resume,
        overwrite=overwrite,
        accept_changes=accept_changes,
        test=test,
        show=show,
    )


class TrainOptions(TypedDict, total=False):
    """The arguments of `sft` after the recipe and its overrides."""

    resume: bool
    overwrite: bool
    accept_changes: bool
    test: bool
    show: Report | None


def dpo(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] | dict[str, Any] = (),
    **options: Unpack[TrainOptions],
) -> Run:
    """Trains a recipe on pairs of answers (objective dpo, simpo or orpo) and returns the run.

    Args:
        recipe: as in `sft`, like `overrides`.
        overrides: changes to the recipe.
        **options: resume, overwrite, accept_changes, test and show, as in `sft`.

    Raises:
        VlmTuneError: as `sft`.
    """
    return train_by("dpo", as_recipe(recipe, overrides), **options)


def kto(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] | dict[str, Any] = (),
    **options: Unpack[TrainOptions],
) -> Run:
    """Trains a recipe on answers that are liked or disliked (objective kto) and returns the run.

    Args:
        recipe: as in `sft`, like `overrides`.
        overrides: changes to the recipe.
        **options: resume, overwrite, accept_changes, test and show, as in `sft`.

    Raises:
        VlmTuneError: as `sft`.
    """
    return train_by("kto", as_recipe(recipe, overrides), **options)


def grpo(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] | dict[str, Any] = (),
    **options: Unpack[TrainOptions],
) -> Run:
    """Trains a recipe on sampled completions that are rewarded (objective grpo); returns the run.

    Args:
        recipe: as in `sft`, like `overrides`.
        overrides: changes to the recipe.
        **options: resume, overwrite, accept_changes, test and show, as in `sft`.

    Raises:
        VlmTuneError: as `sft`.
    """
    return train_by("grpo", as_recipe(recipe, overrides), **options)


def train_by(command: str, loaded: Recipe, **options: Unpack[TrainOptions]) -> Run:
    """Trains a recipe whose objective is of a command, and turns what it raises into our errors."""
    check_command(loaded, command)
    try:
        return run_recipe(loaded, write_report=write_report, **options)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, loaded) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        message = (
            f"{error.strerror}: {error.filename or loaded.output}; make room, then --resume "
            "continues from the last checkpoint"
        )
        raise TrainingError(message) from error
