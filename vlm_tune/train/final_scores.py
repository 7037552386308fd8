"""The end of a run: saves the model, scores it on the test part, answers the report's samples."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import gather_object

from vlm_tune.config.engine import shards
from vlm_tune.config.objectives import parts_of
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.media_processor import distinct_frames
from vlm_tune.data.prepare.dataset import Prepared
from vlm_tune.data.types import Conversation
from vlm_tune.errors import Interrupted
from vlm_tune.evaluation import metrics
from vlm_tune.evaluation.answer_files import ANSWERS_FILE, save_answers
from vlm_tune.evaluation.assessment import Measured, assess
from vlm_tune.evaluation.baseline_run import BaselineRun, Training, training_rows
from vlm_tune.evaluation.evaluate import score, score_options
from vlm_tune.evaluation.metrics import Answer, Scores
from vlm_tune.events import FinalScores, Scoring
from vlm_tune.model.checkpoint import find_model, save_model
from vlm_tune.model.feature_cache import tower_features
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.paths import write_whole
from vlm_tune.precision import DTYPES
from vlm_tune.resources import peak_resident_memory
from vlm_tune.run_folder import check_present, finished_stages
from vlm_tune.train.forgetting import answer_before, compare_after
from vlm_tune.train.resuming import read_json
from vlm_tune.train.stage import Context
from vlm_tune.train.stage_data import StageRows

STOPPED = "stopped: the model is trained, the test part is not scored yet; --resume does that"
STOPPED_BEFORE = "stopped before training; --resume starts the run"
STOPPED_AFTERWARDS = "the run was asked to stop"
"""Of what follows the scores of the test part: baselines, and the scores on other tasks."""

log = logging.getLogger(__name__)


def save_and_score(
    context: Context,
    model: VisionLanguageNetwork,
    stage_rows: StageRows | None,
    result: dict[str, Any],
) -> dict[str, Any]:
    """Saves the finished model and scores it on the test part of the last stage's rows.

    Without `stage_rows` it is not scored. Rank 0 saves it, and all ranks score that hold it: every
    rank must call it. Adds scores, seconds and peak memory to `result`, on rank 0, and returns it.
    """
    recipe = context.recipe.last_stage
    if context.accelerator.is_main_process:
        check_present(context.run)
        log.info("saving the model")
        save_model(model, context.run / "model")
    rows = [] if stage_rows is None else stage_rows.test[: recipe.evaluate.test_limit]
    if stage_rows is not None and rows:
        started = time.perf_counter()
        scores = _together(context, model, rows, recipe)
        if scores is not None:
            seconds = time.perf_counter() - started
            # What took long is on disk before anything that may fail.
            save_answers(context.run / ANSWERS_FILE, scores.answers)
            measured = assess(scores, recipe.evaluate.metrics)
            write_result(context.run, result | _summary(scores))
            _add_baselines(
                context, model, rows, stage_rows.train, recipe, scores, measured, seconds
            )
            result |= _summary(scores)
            result |= _others_after(context, model, recipe, scores)
            context.report(FinalScores(**scores.summary(), also=result.get("also")))
            result["seconds_test"] = round(time.perf_counter() - started, 2)
    result["seconds"] = round(result["seconds"], 2)
    result["peak_memory_mb"] = peak_memory_mb()
    for stage_peak in context.peaks:
        result |= {
            f"peak_{name}": max(mb, result.get(f"peak_{name}", 0))
            for name, mb in stage_peak.items()
        }
    return result


def caches_features(stage: Recipe | None, model: Path) -> bool | Literal["auto"]:
    """Whether the tower's features are cached to score a saved model; auto: where there is room.

    What the stage's recipe leaves open, or no recipe says, is as in the run that ended in `model`.
    Then its scoring and later ones share the features.
    """
    setting = "auto" if stage is None else stage.train.cache_features
    folder = find_model(model).resolve()
    done = finished_stages(folder)
    if setting != "auto" or not done:
        return setting
    lost = "features are cached where there is room"
    decided = read_json(done[-1], dict, log.warning, lost)
    return setting if decided is None else bool(decided.get("cached"))


def write_result(run: Path, result: dict[str, Any]) -> None:
    """Writes result.json."""
    write_whole(run / "result.json", json.dumps(result, indent=2))


def _summary(scores: Scores) -> dict[str, Any]:
    return {
        name: value for name, value in scores.summary().items() if name not in ("loss", "tokens")
    }


def _add_baselines(
    context: Context,
    model: VisionLanguageNetwork,
    rows: Sequence[Conversation],
    train: Prepared | None,
    recipe: Recipe,
    scores: Scores,
    measured: Sequence[Measured],
    seconds: float,
) -> None:
    """Adds baselines to the scores of rows, which took `seconds`.

    One that fails, or that the run is asked to stop in, is left out with a note.
    """
    settings = recipe.evaluate
    if settings.baselines == [] or parts_of(recipe.objective)[0].kind == "contrastive":
        return
    log.info("computing baselines")
    few = settings.baselines == "auto"
    with context.accelerator.autocast():
        BaselineRun(
            model,
            rows,
            lambda: Training() if train is None else training_rows(train, few=few),
            settings,
            # Baselines are computed on rank 0 alone.
            seconds * (context.accelerator.num_processes if _shares(context, recipe) else 1),
            _caches(context, recipe),
            DTYPES[recipe.train.precision],
            lambda done, of: _progress(context, done, of, STOPPED_AFTERWARDS),
        ).add(scores, measured)


def answer_others(
    context: Context, model: VisionLanguageNetwork, rows: Mapping[str, Sequence[Conversation]]
) -> None:
    """Answers rows of other tasks before training. Raises `Interrupted` if asked to stop."""
    recipe = context.recipe.last_stage
    with _autocast(context, model.device):
        answer_before(
            context.run,
            model,
            recipe,
            rows,
            lambda done, of: _progress(context, done, of, STOPPED_BEFORE),
        )


def _others_after(
    context: Context, model: VisionLanguageNetwork, recipe: Recipe, scores: Scores
) -> dict[str, Any]:
    """The scores on other tasks beside those before training, where there are some.

    A task that fails, or that the run is asked to stop in, is left out with a note in `scores`.
    """
    if not recipe.evaluate.also:
        return {}
    with context.accelerator.autocast():
        compared, notes = compare_after(
            context.run,
            model,
            recipe,
            lambda done, of: _progress(context, done, of, STOPPED_AFTERWARDS),
        )
    scores.notes += notes
    return {"also": compared, **({"notes": scores.notes} if scores.notes else {})}


def _caches(context: Context, recipe: Recipe) -> bool:
    """Whether features are cached to score: where those of the last stage are."""
    setting = recipe.train.cache_features
    return context.caches if setting == "auto" else setting


def _shares(context: Context, recipe: Recipe) -> bool:
    """Whether each rank scores a share of the rows.

    Of a sharded model rank 0 has all weights, and retrieval ranks all rows together.
    """
    if score_options(recipe.evaluate, recipe.objective)["ranks"]:
        return False
    return context.accelerator.num_processes > 1 and not shards(context.section)


def _progress(context: Context, done: int, of: int, stopped: str = STOPPED) -> None:
    """Reports the number of answered rows. Raises `Interrupted` if the run is asked to stop."""
    context.report(Scoring(done, of))
    if context.stop():
        raise Interrupted(stopped)


def _together(
    context: Context, model: VisionLanguageNetwork, rows: Sequence[Conversation], recipe: Recipe
) -> Scores | None:
    """Scores rows on rank 0, in several processes each scores a share where all hold the model.

    Returns None on other ranks. Raises `Interrupted` if a process is asked to stop.
    """
    accelerator = context.accelerator
    main = accelerator.is_main_process
    if not _shares(context, recipe):
        return _score_rows(context, model, rows, recipe, rows) if main else None
    ranks = accelerator.num_processes
    share = rows[accelerator.process_index :: ranks]
    answers: list[Answer] = []
    stopped: Interrupted | None = None
    try:
        answers = _score_rows(context, model, share, recipe, rows).answers if share else []
    except Interrupted as error:
        stopped = error
    shares: list[Any] = gather_object([None if stopped else answers])
    if any(each is None for each in shares):
        raise stopped or Interrupted(STOPPED)
    in_order = [shares[place % ranks][place // ranks] for place in range(len(rows))]
    return metrics.scores(in_order, {}) if main else None


def _score_rows(
    context: Context,
    model: VisionLanguageNetwork,
    rows: Sequence[Conversation],
    recipe: Recipe,
    of_all_ranks: Sequence[Conversation],
) -> Scores:
    """Scores rows with the recipe's evaluation settings. Raises `Interrupted` if asked to stop.

    Features are cached where those of the last stage are, of the images of all ranks' rows: the
    ranks share the work, and the files are those that one process looks for, as `eval` does.
    """
    cached = any(row.media for row in of_all_ranks) and _caches(context, recipe)
    frames = distinct_frames(of_all_ranks, model.processor.images) if cached else []
    with context.accelerator.autocast():
        autocast = DTYPES[recipe.train.precision]
        features = (
            tower_features(model, frames, note=context.note, autocast=autocast) if cached else None
        )
        return score(
            model,
            rows,
            **score_options(recipe.evaluate, recipe.objective),
            features=features,
            loss=False,
            compile=recipe.train.compile,
            progress=lambda done, of: _progress(context, done, of),
        )


def _autocast(context: Context, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast as in training, on the device of a model.

    That is the CPU for a model that an engine will shard.
    """
    if device.type == context.accelerator.device.type:
        return context.accelerator.autocast()
    precision = DTYPES[context.recipe.train.precision]
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def write_samples(
    context: Context, model: VisionLanguageNetwork, rows: Sequence[Conversation], column: str
) -> None:
    """Adds the model's answers to samples.json in the column `before` or `after`."""
    if not rows:
        return
    recipe = context.recipe.last_stage
    path = context.run / "samples.json"
    entries = read_json(path, list, context.note, "the answers before training are lost") or []
    known = {entry["id"]: entry for entry in entries if isinstance(entry, dict) and "id" in entry}
    with _autocast(context, model.device):
        answers = score(
            model,
            rows,
            decoding=Decoding(recipe.evaluate.max_new_tokens),
            answering=recipe.evaluate.answering,
            batch_size=16,
            loss=False,
        ).answers
    table = []
    for answer in answers:
        entry = known.get(answer.id) or {
            "id": answer.id,
            "image": answer.image,
            "question": answer.question,
            "expected": answer.expected,
            "size": answer.references.size,
        }
        table.append({"before": None, "after": None, **entry, column: answer.generated})
    write_whole(path, json.dumps(table, indent=1, ensure_ascii=False))


def peak_memory_mb() -> int:
    """The process's largest resident set so far, in MB (10^6 bytes)."""
    return peak_resident_memory() // 1_000_000
