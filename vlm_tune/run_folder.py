"""A run's folder: created or refused before anything heavy is loaded.

It is emptied only of files that a run wrote there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_tune.config.changes import fixed_changes, recipe_changes
from vlm_tune.config.load import load_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.errors import Problem, RecipeError, TrainingError
from vlm_tune.paths import check_writable, is_file, shown_path, writing
from vlm_tune.run_lock import HOLDER, check_lock
from vlm_tune.run_lock import NAME as LOCK

MARK = ".vlm_tune-run"
"""The file that marks a folder as a run's: without it nothing in a folder is ever deleted."""

RECIPE = "recipe.yaml"
RESULTS = ("result.json", "report.html", "answers.jsonl")
EARLIER = "earlier_result.json"
"""The earlier result of a run that has been extended since."""

FILES = (
    "log.jsonl",
    "tuning.json",
    "samples.json",
    "data.json",
    "quarantine.jsonl",
    EARLIER,
    *RESULTS,
    RECIPE,
)
ALSO = "also"
"""The folder with answers to rows of other tasks, before and after training."""
STAGE_FILES = ("trace.jsonl", "nonfinite.jsonl", "done.json")
MODEL = "model"
WRITTEN = ".recipe.yaml"
"""The recipe while it is being written: all that remains of a start that was killed that early."""

MANIFEST = "manifest.json"
"""Lists the files of a model folder."""

OUTPUT = "the output folder"


def recipe_above(folder: Path) -> Path | None:
    """The recipe of the run that a folder is or lies in; None if it lies in none.

    Of a folder behind a link, both the link's place and its own count.
    """
    above = (folder, *folder.parents, *folder.resolve().parents)
    return next((each / RECIPE for each in above if is_file(each / RECIPE)), None)


def finished_stages(model: Path) -> list[Path]:
    """The files `done.json` of the run that ended in a model folder, in the order of its stages."""
    if model.name != MODEL:
        return []
    files = (model.parent / "stages").glob("*/done.json")
    numbered = [each for each in files if each.parent.name.partition("-")[0].isdecimal()]
    return sorted(numbered, key=lambda each: int(each.parent.name.partition("-")[0]))


def check_run(
    run: Path, recipe: Recipe, *, resume: bool, overwrite: bool, accept_changes: bool
) -> None:
    """Checks that the run can be started or resumed in this folder; changes nothing.

    Raises:
        RecipeError: it can't be, or the folder can't be written.
        TrainingError: another process is running in the folder.
    """
    check_writable(run, OUTPUT, folder=True)
    check_lock(run)
    marked = (run / MARK).is_file()
    saved = run / RECIPE
    if resume:
        if not marked or not saved.is_file():
            missing = f"no {RECIPE}" if marked else f"no {MARK}, which every run writes"
            raise RecipeError(
                [Problem(shown_path(run), f"there is no run to resume here ({missing})")]
            )
        _check_changes(run, load_recipe(saved), recipe, accept_changes=accept_changes)
    elif run.exists() and _holds_files(run) and not (overwrite and marked):
        stranger = "it was not written by a run, so nothing in it is deleted; choose another output"
        hint = "--resume continues it, --overwrite starts over" if marked else stranger
        raise RecipeError([Problem(shown_path(run), f"the output folder is not empty; {hint}")])


def _check_changes(run: Path, old: Recipe, recipe: Recipe, *, accept_changes: bool) -> None:
    """Raises `RecipeError` for a recipe that the run can't continue with."""
    saved = str(run / RECIPE)
    stage = _begun(run)
    fixed = fixed_changes(old, recipe, stage) if stage is not None else []
    if accept_changes:
        if fixed:
            lines = [
                Problem(saved, f"a run that has begun can't change this: {change}")
                for change in fixed
            ]
            hint = (
                "its checkpoints depend on it; resume with the run's value, or start another "
                "run (another output, or --overwrite)"
            )
            raise RecipeError([*lines, Problem(saved, hint)])
        return
    changes = recipe_changes(old, recipe)
    if changes:
        lines = [
            Problem(saved, f"the recipe differs from the run's: {change}") for change in changes
        ]
        hint = "--resume needs the run's own recipe; --accept-changes continues with this one"
        if fixed:
            hint = (
                "a run that has begun can't change "
                f"{', '.join(change.name for change in fixed)}: start another run"
            )
        raise RecipeError([*lines, Problem(saved, hint)])


def _begun(run: Path) -> int | None:
    """Returns the index of the last stage that has a checkpoint; None where there is none."""
    numbers = [
        int(match[1]) - 1
        for path in run.glob("stages/*/checkpoints/step-*")
        if (match := re.match(r"(\d+)-", path.parts[-3]))
    ]
    return max(numbers, default=None)


def _holds_files(run: Path) -> bool:
    return any(path.name not in (LOCK, HOLDER, WRITTEN, MARK) for path in run.iterdir())


def open_run(
    run: Path, recipe: Recipe, text: str, *, resume: bool, overwrite: bool, accept_changes: bool
) -> list[str]:
    """Creates and marks the run's folder and writes the recipe of a new run.

    A resumed run's recipe stays as it is until `keep_recipe`. Raises as `check_run`.

    Returns:
        A note for each value that a resumed run's recipe changes.
    """
    check_run(run, recipe, resume=resume, overwrite=overwrite, accept_changes=accept_changes)
    if resume:
        return [
            f"resumed with a changed recipe: {change}"
            for change in recipe_changes(load_recipe(run / RECIPE), recipe)
        ]
    with writing(run, OUTPUT):
        run.mkdir(parents=True, exist_ok=True)
        if (run / MARK).is_file():
            remove_written(run)
        (run / MARK).write_text(json.dumps({"written_by": "vlm_tune", "kind": "run"}))
        keep_recipe(run, text)
    return []


def keep_recipe(run: Path, text: str) -> None:
    """Writes the recipe that the run continues with."""
    (run / WRITTEN).write_text(text)
    (run / WRITTEN).replace(run / RECIPE)


def retire_result(run: Path) -> str | None:
    """Sets aside the result of a finished run that continues.

    Returns a note about it, or None if there is no result.
    """
    if not (run / "result.json").is_file():
        return None
    (run / "result.json").replace(run / EARLIER)
    for name in RESULTS:
        (run / name).unlink(missing_ok=True)
    return (
        f"the finished run continues: its earlier result is in {EARLIER}, and {MODEL}/ stays "
        "the earlier one until the end"
    )


def check_present(run: Path) -> None:
    """Raises `TrainingError` if the folder of the running run no longer exists."""
    if not (run / MARK).exists():
        raise TrainingError(
            f"{run}: the run's folder was deleted or moved while it ran; the run stops, because "
            "nothing can be saved"
        )


def remove_written(run: Path) -> None:
    """Removes the files that a run wrote to its folder; other files and their folders stay."""
    for name in FILES:
        (run / name).unlink(missing_ok=True)
    for path in (run / ALSO).glob("*.jsonl"):
        path.unlink()
    _remove_empty(run / ALSO)
    remove_weights(run)
    for stage in _folders(run / "stages", r"\d+-"):
        for name in STAGE_FILES:
            (stage / name).unlink(missing_ok=True)
        _remove_empty(stage)
    _remove_empty(run / "stages")


def remove_weights(run: Path) -> None:
    """Removes the model and the checkpoints that a run wrote; what it was and scored stays."""
    remove_model(run / MODEL)
    for stage in _folders(run / "stages", r"\d+-"):
        for checkpoint in _folders(stage / "checkpoints", r"step-\d+$"):
            remove_model(checkpoint)
        _remove_empty(stage / "checkpoints")


def remove_model(folder: Path) -> None:
    """Removes a model folder except files that its manifest does not list, and their folders."""
    others = strangers(folder)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            _remove_empty(path)
        elif path not in others:
            path.unlink(missing_ok=True)
    _remove_empty(folder)


def strangers(folder: Path) -> set[Path]:
    """Returns the files in a model folder that its manifest does not list: somebody else's.

    Without a manifest these are all files, since a model folder appears only once it has one. With
    a damaged manifest there are none.
    """
    files = {path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    if not (folder / MANIFEST).is_file():
        return files
    try:
        value: Any = json.loads((folder / MANIFEST).read_text())
        return files - {folder / str(name) for name in value["files"]} - {folder / MANIFEST}
    except (ValueError, KeyError, TypeError):
        return set()


def _folders(parent: Path, pattern: str) -> Iterator[Path]:
    for path in sorted(parent.glob("*")):
        if path.is_dir() and not path.is_symlink() and re.match(pattern, path.name):
            yield path


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
