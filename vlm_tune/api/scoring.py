"""Scores, answers and reports by Python: `evaluate`, `compare`, `predict`, `report`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from vlm_tune.config.load import as_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.config.train import EvaluateSection
from vlm_tune.data.prepare.run import read_part
from vlm_tune.data.sources.registry import read_path
from vlm_tune.data.types import Conversation
from vlm_tune.errors import (
    ModelError,
    Problem,
    RecipeError,
    check_count,
    check_counts,
)
from vlm_tune.evaluation.answer_files import read_answers
from vlm_tune.evaluation.benchmarks import read_benchmarks
from vlm_tune.evaluation.compare import Comparison
from vlm_tune.evaluation.compare import compare as compare_answers
from vlm_tune.evaluation.evaluate_rows import chosen_settings, evaluate_rows, read_files
from vlm_tune.evaluation.metrics import Scores
from vlm_tune.evaluation.predict import Predictions, write_answers
from vlm_tune.events import Report, Scoring
from vlm_tune.model.base_places import BaseArgument, base_choice
from vlm_tune.model.checkpoint import find_model, find_single, load_model
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.paths import (
    ANSWERS,
    PAGE,
    check_path,
    check_writable,
    is_folder,
    shown_path,
    writing,
)
from vlm_tune.precision import dtype_of
from vlm_tune.quoting import quoted
from vlm_tune.rendering.report import write_report
from vlm_tune.rendering.run_log import check_run_folder
from vlm_tune.rendering.runs_report import write_runs_report
from vlm_tune.run_folder import recipe_above
from vlm_tune.saved_models import find_recipe, recipe_differences
from vlm_tune.train.allocator import keep_freed_memory, shut_range
from vlm_tune.train.final_scores import caches_features

log = logging.getLogger(__name__)


def evaluate(
    model: str | Path,
    recipe: str | Path | Recipe | None = None,
    overrides: Sequence[str] | dict[str, Any] = (),
    *,
    split: Literal["validation", "test"] = "test",
    data: str | Path | Sequence[str | Path] | None = None,
    benchmark: str | Sequence[str] | None = None,
    limit: int | None = None,
    metrics: Sequence[str] | None = None,
    baselines: Literal["auto"] | Sequence[str] | None = None,
    answering: Literal["generate", "likelihood"] | None = None,
    dtype: str | None = None,
    base: BaseArgument = None,
    accept_other_base: bool = False,
    show: Report | None = None,
) -> Scores:
    """Scores a model on a part of a recipe's last stage, or on files of rows.

    Args:
        model: a run, a checkpoint or a merged folder.
        recipe: recipe whose data is scored; the run's by default.
        overrides: changes to the recipe, as in `sft`.
        split: the part of the recipe to score.
        data: a file, a pattern of files, or tar shards, of rows of any form, or several of these;
            scored in place of the recipe's part.
        benchmark: local copies of public benchmarks as `"pope=FOLDER"`, scored by their own rules
            in place of the recipe's part.
        limit: score the first rows only.
        metrics: names of metrics or `module:function`; the recipe's, or those of the rows' form,
            by default.
        baselines: names of baselines, `auto` or []; the recipe's by default.
        answering: `likelihood` chooses among a row's choices; the recipe's by default.
        dtype: bf16, fp16 or fp32; the model's own by default.
        base: as in `merge`, like `accept_other_base`.
        show: called with every event.

    Raises:
        RecipeError: the part is empty or unknown, or an argument has the wrong type or value.
        DataError: a row can't be used.
        ModelError: the model can't be loaded.
    """
    folder = _model_folder(model, split, limit)
    precision = dtype_of(dtype)
    places = base_choice(base, accept_other_base)
    if data is not None or benchmark is not None:
        stage = _last_stage(folder, recipe, overrides)
        given = EvaluateSection() if stage is None else stage.evaluate
        settings = chosen_settings(given, metrics, baselines, answering)
        rows = _rows_of(data, benchmark)[:limit]
        vlm = load_model(folder, dtype=precision, base=places)
        caches = caches_features(stage, folder)
        return _score_rows(vlm, rows, settings, stage, caches, compile=False, show=show)
    loaded = as_recipe(find_recipe(folder) if recipe is None else recipe, overrides)
    stage = loaded.last_stage
    settings = chosen_settings(stage.evaluate, metrics, baselines, answering)
    _check_part(stage, split)
    vlm = load_model(folder, dtype=precision, base=places)
    options: dict[str, Any] = {"split": split, "limit": limit, "settings": settings, "show": show}
    return evaluate_model(vlm, loaded, caches=caches_features(stage, folder), **options)


def _model_folder(model: str | Path, split: str, limit: int | None) -> Path:
    """The folder of a model to score. Raises `RecipeError` for an argument of a wrong kind."""
    check_path("model", model)
    if split not in ("validation", "test"):
        raise RecipeError([Problem("--split", f"{quoted(split)} is not one of validation, test")])
    check_count("--limit", limit)
    return Path(model)


def _rows_of(
    data: str | Path | Sequence[str | Path] | None, benchmark: str | Sequence[str] | None
) -> list[Conversation]:
    """The rows of copies of benchmarks and of files. Raises as `evaluate`."""
    return [
        *read_benchmarks(() if benchmark is None else benchmark),
        *([] if data is None else read_files(data)),
    ]


def _check_part(stage: Recipe, split: Literal["validation", "test"]) -> None:
    """Raises `RecipeError` for a part that has no rows of its own and is not held out."""
    held_out = stage.data.split is not None and getattr(stage.data.split, split) > 0
    if not getattr(stage.data, split) and not held_out:
        raise RecipeError([Problem("recipe", f"data.{split} is empty: there is nothing to score")])


def evaluate_model(
    model: VisionLanguageNetwork,
    recipe: Recipe,
    *,
    split: Literal["validation", "test"] = "test",
    limit: int | None = None,
    settings: EvaluateSection | None = None,
    caches: bool | Literal["auto"] | None = None,
    show: Report | None = None,
) -> Scores:
    """Scores a loaded model on the `test` or `validation` part of a recipe's last stage.

    `settings` replace the recipe's own, and `caches` its `train.cache_features`; with auto features
    are cached where there is room.
    """
    stage = recipe.last_stage
    rows = read_part(stage.data, split, model.processor, stage.seed)[:limit]
    chosen = settings or stage.evaluate
    caches = stage.train.cache_features if caches is None else caches
    return _score_rows(model, rows, chosen, stage, caches, compile=stage.train.compile, show=show)


def _score_rows(
    model: VisionLanguageNetwork,
    rows: Sequence[Conversation],
    settings: EvaluateSection,
    stage: Recipe | None,
    caches: bool | Literal["auto"],
    *,
    compile: bool | str,
    show: Report | None,
) -> Scores:
    keep_freed_memory()
    try:
        return evaluate_rows(
            model, rows, settings, stage, caches=caches, compile=compile, report=show
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
    return None if recipe is None else as_recipe(recipe, overrides).last_stage


def compare(
    first: str | Path,
    second: str | Path,
    *,
    data: str | Path | Sequence[str | Path] | None = None,
    limit: int | None = None,
    metrics: Sequence[str] | None = None,
    show: Report | None = None,
) -> Comparison:
    """Compares two runs' answers to the same rows: paired differences, flipped rows, recipes.

    Args:
        first: a run; with `data` any model folder.
        second: the one that is compared with it.
        data: files of rows that both answer now; the answers to their test parts by default.
        limit: compare the first rows only.
        metrics: names of metrics or `module:function`; those of the rows' form by default.
        show: called with every event.

    Raises:
        DataError: a run has no test answers, or the rows of the two differ.
        RecipeError: an argument has the wrong type, or a name is no metric.
        ModelError: a model can't be loaded.
    """
    for name, path in (("RUN_A", first), ("RUN_B", second)):
        check_path(name, path)
    check_count("--limit", limit)
    chosen = chosen_settings(EvaluateSection(), metrics, None).metrics
    folders = Path(first), Path(second)
    for folder in folders:
        if not is_folder(folder):
            raise ModelError(f"no such folder: {shown_path(folder)}")
    recipes = [recipe_above(folder) for folder in folders]
    if data is None:
        answers = [read_answers(folder) for folder in folders]
    else:
        options: dict[str, Any] = {"limit": limit, "metrics": chosen, "baselines": (), "show": show}
        answers = [evaluate(folder, data=data, **options).answers for folder in folders]
    names = str(first), str(second)
    changes = recipe_differences(*recipes)
    return compare_answers(*answers, names=names, metrics=chosen, limit=limit, recipe=changes)


def report(runs: str | Path | Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Writes the report of a run again, or one page that overlays several runs.

    Args:
        runs: one run's folder, or up to six: the first is the one the others are compared with.
        output: the HTML file to write, which replaces an earlier page; `report.html` in the run's
            folder, or of several runs in the current folder, by default.

    Returns:
        The path of the page.

    Raises:
        RecipeError: an argument has the wrong type, a folder is not a run's, there are too many, or
            the page can't be written.
    """
    if isinstance(runs, str | Path):
        runs = [runs]
    if not isinstance(runs, Sequence) or isinstance(runs, bytes) or not runs:
        raise RecipeError([Problem("RUN", f"expected folders of runs, got {quoted(runs)}")])
    for run in runs:
        check_path("RUN", run)
    folders = [Path(run) for run in runs]
    for folder in folders:
        check_run_folder(folder)
    if output is None:
        output = folders[0] / "report.html" if len(folders) == 1 else "report.html"
    check_path("--output", output)
    path = Path(output)
    check_writable(path, "the page", mark=PAGE)
    with writing(path, "the page"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(folders) == 1:
            return write_report(folders[0], path)
        return write_runs_report(folders, path)


def predict(
    model: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    num_beams: int | None = None,
    batch_size: int | None = None,
    json_schema: Mapping[str, Any] | None = None,
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
        max_new_tokens: longest answer; the run's recipe sets this and the next two by default.
        num_beams: 1 is greedy.
        batch_size: rows per batch.
        json_schema: a JSON schema that every answer follows.
        dtype: bf16, fp16 or fp32; the model's own by default.
        base: as in `merge`, like `accept_other_base`.
        show: called with every event.

    Raises:
        RecipeError: an argument has the wrong type, or the output can't be written.
        ArgumentError: no answer can follow the schema.
        DataError: a row can't be used; raised before the model is loaded.
        ModelError: the model can't be loaded.
    """
    for name, value in (("model", model), ("data", data), ("output", output)):
        check_path(name, value)
    counts = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "batch_size": batch_size}
    check_counts(limit=limit, **counts)
    precision = dtype_of(dtype)
    stage = _last_stage(Path(model), None, ())
    settings = EvaluateSection() if stage is None else stage.evaluate
    tokens = max_new_tokens or settings.max_new_tokens
    decoding = Decoding(tokens, num_beams or settings.num_beams, json_schema=json_schema)
    check_writable(output, "the file of answers", mark=ANSWERS)
    log.info("reading the rows")
    rows, unanswered = read_path(str(data), seed=0, unanswered=True)
    log.info("loading the model")
    folder = find_single(Path(model))
    return write_answers(
        load_model(folder, dtype=precision, base=base_choice(base, accept_other_base)),
        rows[:limit],
        unanswered,
        Path(output),
        decoding=decoding,
        batch_size=batch_size or settings.batch_size,
        progress=lambda done, of: show(Scoring(done, of)) if show else None,
    )
