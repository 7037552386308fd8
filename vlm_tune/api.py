"""The functions of `import vlm_tune`: train, score, predict, merge, export; the CLI calls them."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from vlm_tune.config.load import as_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.config.train import EvaluateSection
from vlm_tune.data.prepare.run import read_part
from vlm_tune.data.sources.registry import read_path
from vlm_tune.data.types import Conversation, distinct_media
from vlm_tune.errors import (
    ModelError,
    Problem,
    RecipeError,
    TrainingError,
    check_count,
    check_counts,
)
from vlm_tune.evaluation.evaluate import score
from vlm_tune.evaluation.metrics import Scores
from vlm_tune.evaluation.predict import Predictions, write_answers
from vlm_tune.events import Event, Features, Report, Scoring
from vlm_tune.exporting import export
from vlm_tune.exporting.merge import merge
from vlm_tune.model.base_places import BaseArgument, base_choice
from vlm_tune.model.checkpoint import find_model, load_model
from vlm_tune.model.feature_cache import tower_features
from vlm_tune.model.feature_choice import has_room
from vlm_tune.model.hub import read_json
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.paths import ANSWERS, check_path, check_writable, is_folder, shown_path
from vlm_tune.precision import dtype_of
from vlm_tune.quoting import quoted
from vlm_tune.rendering.report import write_report
from vlm_tune.run_folder import recipe_above
from vlm_tune.train.allocator import keep_freed_memory, shut_range
from vlm_tune.train.final_scores import caches_features
from vlm_tune.train.out_of_memory import is_out_of_memory, out_of_memory
from vlm_tune.train.replay import verify_run
from vlm_tune.train.run import Run
from vlm_tune.train.run import sft as run_recipe

__all__ = ["evaluate", "export", "merge", "predict", "sft", "verify_run"]

log = logging.getLogger(__name__)


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
        overwrite: start anew and delete what a run wrote to the output folder.
        accept_changes: with `resume`, continue with this recipe though it differs from the run's.
        test: score the test part at the end.
        show: called with every event.

    Returns:
        The run: its folder, result and model.

    Raises:
        VlmTuneError: an error of `vlm_tune.errors`: a bad recipe, bad data or weights, or training
            that stopped.
    """
    loaded = as_recipe(recipe, overrides)
    try:
        return run_recipe(
            loaded,
            resume=resume,
            overwrite=overwrite,
            accept_changes=accept_changes,
            test=test,
            show=show,
            write_report=write_report,
        )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, loaded) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        message = (
            f"{error.strerror}: {error.filename or loaded.output}; make room, then --resume goes "
            f"on from the last checkpoint"
        )
        raise TrainingError(message) from error


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
        message = "no recipe.yaml in this folder or above it; say which data with --recipe"
        raise RecipeError([Problem(shown_path(model), message)])
    return recipe


def evaluate(
    model: str | Path,
    recipe: str | Path | Recipe | None = None,
    overrides: Sequence[str] | dict[str, Any] = (),
    *,
    split: Literal["validation", "test"] = "test",
    data: str | Path | None = None,
    limit: int | None = None,
    dtype: str | None = None,
    base: BaseArgument = None,
    accept_other_base: bool = False,
    show: Report | None = None,
) -> Scores:
    """Scores a model on a part of a recipe's last stage, or on a file of rows.

    Args:
        model: a run, a checkpoint or a merged folder.
        recipe: whose data to score on; the run's own where not given.
        overrides: changes to the recipe, as in `sft`.
        split: the part of the recipe to score.
        data: a file, a pattern of files, or tar shards, of rows of any form; scored in place of the
            recipe's part.
        limit: score the first rows only.
        dtype: bf16, fp16 or fp32; the model's own where not given.
        base: as in `merge`, like `accept_other_base`.
        show: called with every event.

    Raises:
        RecipeError: the part is empty or unknown, an argument has the wrong type, or the limit is
            under 1.
        DataError: a row can't be used.
        ModelError: the model can't be loaded.
    """
    check_path("model", model)
    if split not in ("validation", "test"):
        raise RecipeError([Problem("--split", f"{quoted(split)} is none of validation, test")])
    check_count("--limit", limit)
    precision = dtype_of(dtype)
    folder = Path(model)
    if data is not None:
        check_path("data", data)
        last = _last_stage(folder, recipe, overrides)
        rows, _ = read_path(str(data), seed=0)
        vlm = load_model(folder, dtype=precision, base=base_choice(base, accept_other_base))
        caches = caches_features(last, folder)
        return _score_rows(vlm, rows[:limit], last, caches, compile=False, show=show)
    loaded = as_recipe(find_recipe(folder) if recipe is None else recipe, overrides)
    stage = loaded.resolved_stages()[-1][1]
    held_out = stage.data.split is not None and getattr(stage.data.split, split) > 0
    if not getattr(stage.data, split) and not held_out:
        raise RecipeError([Problem("recipe", f"data.{split} is empty: there is nothing to score")])
    loaded_model = load_model(folder, dtype=precision, base=base_choice(base, accept_other_base))
    caches = caches_features(stage, folder)
    return evaluate_model(loaded_model, loaded, split=split, limit=limit, caches=caches, show=show)


def evaluate_model(
    model: VisionLanguageNetwork,
    recipe: Recipe,
    *,
    split: Literal["validation", "test"] = "test",
    limit: int | None = None,
    caches: bool | Literal["auto"] | None = None,
    show: Report | None = None,
) -> Scores:
    """Scores a loaded model on the `test` or `validation` part of a recipe's last stage.

    `caches` replaces the recipe's `train.cache_features`; with auto they are where there is room.
    """
    stage = recipe.resolved_stages()[-1][1]
    rows = read_part(stage.data, split, model.processor, stage.seed)[:limit]
    caches = stage.train.cache_features if caches is None else caches
    return _score_rows(model, rows, stage, caches, compile=stage.train.compile, show=show)


def _score_rows(
    model: VisionLanguageNetwork,
    rows: Sequence[Conversation],
    stage: Recipe | None,
    caches: bool | Literal["auto"],
    *,
    compile: bool | str,
    show: Report | None,
) -> Scores:
    settings = EvaluateSection() if stage is None else stage.evaluate
    media = distinct_media(rows)
    cached = bool(media) and (has_room(model, len(media)) if caches == "auto" else caches)

    def progress(event: Callable[[int, int], Event]) -> Callable[[int, int], None]:
        return lambda done, of: show(event(done, of)) if show else None

    keep_freed_memory()
    try:
        return score(
            model,
            rows,
            decoding=Decoding(settings.max_new_tokens, settings.num_beams),
            batch_size=settings.batch_size,
            features=tower_features(model, media, progress(Features)) if cached else None,
            loss=False,
            compile=compile,
            progress=progress(Scoring),
        )
    finally:
        shut_range()


def _last_stage(
    folder: Path, recipe: str | Path | Recipe | None, overrides: Sequence[str] | dict[str, Any]
) -> Recipe | None:
    """Returns the last stage of a recipe; None where there is no recipe.

    Where none is given, the recipe is that of the run that `folder` lies in, and `ModelError` is
    raised if `folder` holds no model.
    """
    if recipe is None:
        find_model(folder)
        recipe = recipe_above(folder)
    return None if recipe is None else as_recipe(recipe, overrides).resolved_stages()[-1][1]


def predict(
    model: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    num_beams: int | None = None,
    batch_size: int | None = None,
    dtype: str | None = None,
    base: BaseArgument = None,
    accept_other_base: bool = False,
    show: Report | None = None,
) -> Predictions:
    """Answers the last question of every row of a file, unscored, and writes the answers as JSONL.

    Args:
        model: a run, a checkpoint or a merged folder.
        data: a file, a pattern of files, or tar shards, of rows in any form, also without answers.
        output: the JSONL file to write; an existing file of answers is replaced.
        limit: answer the first rows only.
        max_new_tokens: longest answer in tokens; the run's recipe sets this and the next two where
            they are not given.
        num_beams: 1 is greedy.
        batch_size: rows per batch.
        dtype: bf16, fp16 or fp32; the model's own where not given.
        base: as in `merge`, like `accept_other_base`.
        show: called with every event.

    Raises:
        RecipeError: an argument has the wrong type, or the output can't be written.
        DataError: a row can't be used; raised before the model is loaded.
        ModelError: the model can't be loaded.
    """
    for name, value in (("model", model), ("data", data), ("output", output)):
        check_path(name, value)
    check_counts(
        limit=limit, max_new_tokens=max_new_tokens, num_beams=num_beams, batch_size=batch_size
    )
    precision = dtype_of(dtype)
    last = _last_stage(Path(model), None, ())
    settings = EvaluateSection() if last is None else last.evaluate
    check_writable(output, "the file of answers", mark=ANSWERS)
    log.info("reading the rows")
    rows, unanswered = read_path(str(data), seed=0, unanswered=True)
    log.info("loading the model")
    vlm = load_model(Path(model), dtype=precision, base=base_choice(base, accept_other_base))
    return write_answers(
        vlm,
        rows[:limit],
        unanswered,
        Path(output),
        decoding=Decoding(
            max_new_tokens or settings.max_new_tokens, num_beams or settings.num_beams
        ),
        batch_size=batch_size or settings.batch_size,
        progress=lambda done, of: show(Scoring(done, of)) if show else None,
    )


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
            text += ", the last whole one: the run has no finished model yet"
        return {
            "folder": str(folder),
            "about": text,
            "stage": stage,
            "step": int(step) if step.isdecimal() else None,
            "run": str(run),
        }
    stages = sorted((above.parent / "stages").glob("*/done.json")) if above.name == "model" else []
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
