"""The functions of `import vlm_tune`: train, evaluate, merge, export; the command line calls the same."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from vlm_tune.config import Recipe
from vlm_tune.data.prepare import read_part
from vlm_tune.data.types import distinct_media
from vlm_tune.errors import ModelError, Problem, RecipeError, TrainingError, check_count
from vlm_tune.evaluation import Scores, score
from vlm_tune.exporting import ExportReport
from vlm_tune.exporting import export as export_folder
from vlm_tune.merging import MergeReport
from vlm_tune.merging import merge as merge_folder
from vlm_tune.model.bases import BaseArgument, base_choice
from vlm_tune.model.build import dtype_of
from vlm_tune.model.features import tower_features
from vlm_tune.model.llm import Decoding
from vlm_tune.model.store import load_model
from vlm_tune.model.vlm import VisionLanguageModel
from vlm_tune.paths import is_file, is_folder, shown_path
from vlm_tune.recipe import load_recipe
from vlm_tune.train.allocator import keep_freed_memory, shut_range
from vlm_tune.train.loop import Report
from vlm_tune.train.memory import is_out_of_memory, out_of_memory
from vlm_tune.train.replay import ReplayReport
from vlm_tune.train.replay import verify_run as replay_run
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
    """Trains a recipe and returns the run (folder, result, model); `show` is given every event.

    `test=False` leaves the test part unscored.

    A run is resumed with its own recipe, or with `accept_changes` with this one.
    Raises the errors of `vlm_tune.errors`: a bad recipe, data, weights, or training that stopped.
    """
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    try:
        return run_recipe(loaded, resume=resume, overwrite=overwrite, accept_changes=accept_changes, test=test, show=show)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, loaded) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        said = f"{error.strerror}: {error.filename or loaded.output}; make room, then --resume goes on from the last checkpoint"
        raise TrainingError(said) from error


def verify_run(run: str | Path, *, steps: int | None = None, show: Report | None = None) -> ReplayReport:
    """Replays steps of a run from one of its checkpoints and compares samples, losses, gradient norms and tensors bit for bit.

    Raises `RecipeError` if no checkpoint is kept to start from.
    """
    return replay_run(Path(run), steps=steps, show=show)


def find_recipe(model: Path) -> Path:
    """The recipe of a run that a model folder lies in. Raises `RecipeError` if there is none."""
    if not is_folder(model):
        raise ModelError(f"no such folder: {shown_path(model)}")
    for folder in (model, *model.resolve().parents):
        if is_file(folder / "recipe.yaml"):
            return folder / "recipe.yaml"
    raise RecipeError([Problem(shown_path(model), "no recipe.yaml in this folder or above it; say which data with --recipe")])


def evaluate(
    model: str | Path,
    recipe: str | Path | Recipe | None = None,
    overrides: Sequence[str] | dict[str, Any] = (),
    *,
    split: Literal["validation", "test"] = "test",
    limit: int | None = None,
    dtype: str | None = None,
    base: BaseArgument = None,
    accept_other_base: bool = False,
    show: Report | None = None,
) -> Scores:
    """Scores a run, checkpoint or merged folder on the `test` or `validation` part of a recipe's last stage.

    The recipe is the run's own where none is given; `limit` scores the first rows only; `base` and `accept_other_base`
    are as in `merge`. Raises `RecipeError` if that part is empty or unknown, or the limit under 1.
    """
    if split not in ("validation", "test"):
        raise RecipeError([Problem("--split", f"{split!r} is none of validation, test")])
    check_count("--limit", limit)
    precision = dtype_of(dtype)
    folder = Path(model)
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe or find_recipe(folder), overrides)
    stage = loaded.resolved_stages()[-1][1]
    held_out = stage.data.split is not None and getattr(stage.data.split, split) > 0
    if not getattr(stage.data, split) and not held_out:
        raise RecipeError([Problem("recipe", f"data.{split} is empty: there is nothing to score")])
    loaded_model = load_model(folder, dtype=precision, base=base_choice(base, accept_other_base))
    return evaluate_model(loaded_model, loaded, split=split, limit=limit, show=show)


def evaluate_model(
    model: VisionLanguageModel,
    recipe: Recipe,
    *,
    split: Literal["validation", "test"] = "test",
    limit: int | None = None,
    show: Report | None = None,
) -> Scores:
    """Scores a loaded model on the `test` or `validation` part of a recipe's last stage."""
    stage = recipe.resolved_stages()[-1][1]
    rows = read_part(stage.data, split, model.processor, stage.seed)[:limit]
    media = distinct_media(rows)
    keep_freed_memory()
    try:
        return score(
            model,
            rows,
            decoding=Decoding(stage.evaluate.max_new_tokens, stage.evaluate.num_beams),
            batch_size=stage.evaluate.batch_size,
            features=tower_features(model, media) if media else None,
            loss=False,
            compile=stage.train.compile,
            progress=lambda done, of: show({"event": "scoring", "done": done, "of": of}) if show else None,
        )
    finally:
        shut_range()


def merge(
    model: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    tolerance: float | None = None,
    base: BaseArgument = None,
    accept_other_base: bool = False,
) -> MergeReport:
    """Merges a run's LoRA into 16-bit base weights, verifies, and writes `output`.

    Args:
        model: a run, a checkpoint or a model folder.
        output: the folder to write.
        dtype: bf16, fp16 or fp32; bf16, or the next of these that is fine enough, where not given.
        tolerance: how far the rounding may move logits; 0.02 where not given.
        base: where the LLM's base is now, or `{"llm": ..., "tower": ...}`; where it was where not given.
        accept_other_base: whether to merge into weights other than those that were trained over.

    Raises:
        ModelError: it can't be merged, or fails verification; nothing is written.
        RecipeError: the output can't be written.
    """
    choice = base_choice(base, accept_other_base)
    return merge_folder(Path(model), Path(output), dtype=dtype, tolerance=tolerance, base=choice)


def export(
    model: str | Path,
    output: str | Path,
    *,
    format: str = "llava",
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    verify: bool = True,
    base: BaseArgument = None,
    accept_other_base: bool = False,
) -> ExportReport:
    """Writes a model in another library's layout (`llava` or `gguf`, adapters merged, or `adapter`, a PEFT folder) and verifies it there.

    `base` and `accept_other_base` are as in `merge`.
    Raises `ModelError` for a model that the format can't express, too little memory or disk, and a failed verification.
    """
    choice = base_choice(base, accept_other_base)
    return export_folder(Path(model), Path(output), format=format, dtype=dtype, max_shard_size=max_shard_size, verify=verify, base=choice)
