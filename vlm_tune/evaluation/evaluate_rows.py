"""A whole evaluation of a loaded model: answers, metrics, intervals and baselines."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from vlm_tune.config.recipe import Recipe
from vlm_tune.config.train import Answering, Baseline, EvaluateSection
from vlm_tune.data.media_processor import distinct_frames
from vlm_tune.data.prepare.run import find_prepared, prepared_parts
from vlm_tune.data.sources.registry import read_path
from vlm_tune.data.types import Conversation, distinct_media
from vlm_tune.errors import DataError, Problem, RecipeError
from vlm_tune.evaluation.assessment import assess
from vlm_tune.evaluation.baseline_run import BaselineRun, Training, training_rows
from vlm_tune.evaluation.evaluate import score, score_options
from vlm_tune.evaluation.metrics import Scores
from vlm_tune.evaluation.registry import check_metrics
from vlm_tune.events import Features, Report, Scoring
from vlm_tune.model.feature_cache import tower_features
from vlm_tune.model.feature_choice import caches_images
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.paths import check_path
from vlm_tune.quoting import quoted

log = logging.getLogger(__name__)


def chosen_settings(
    settings: EvaluateSection,
    metrics: Sequence[str] | None,
    baselines: Literal["auto"] | Sequence[str] | None,
    answering: str | None = None,
) -> EvaluateSection:
    """The settings with the metrics, baselines and answering of a call, where it names some.

    Raises `RecipeError` for a name that is none.
    """
    changes: dict[str, Any] = {}
    for option, names in (("metrics", metrics), ("baselines", baselines)):
        listed = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
        if names is not None and not listed and (option, names) != ("baselines", "auto"):
            raise RecipeError(
                [Problem(f"--{option}", f"expected a list of names, not {quoted(names)}")]
            )
        if option == "metrics" and names is not None and not names:
            raise RecipeError([Problem("--metrics", "no metric is named")])
        if names is not None:
            changes[option] = names if isinstance(names, str) else list(names)
    if answering is not None:
        if answering not in get_args(Answering):
            message = f"{quoted(answering)} is not one of {', '.join(get_args(Answering))}"
            raise RecipeError([Problem("--answering", message)])
        changes["answering"] = answering
    given = changes.get("baselines", "auto")
    for name in given if given != "auto" else ():
        if name not in get_args(Baseline):
            message = f"{quoted(name)} is not one of {', '.join(get_args(Baseline))}"
            raise RecipeError([Problem("--baselines", message)])
    chosen = settings.model_copy(update=changes)
    check_metrics(chosen.metrics)
    return chosen


def read_files(files: str | Path | Sequence[str | Path]) -> list[Conversation]:
    """The rows of one or several files; in scores, files of one name are distinguished by path.

    Raises `DataError` for the first row that can't be used, `RecipeError` for a file that is no
    path, and for no files.
    """
    if isinstance(files, str | Path):
        files = [files]
    if not isinstance(files, Sequence):
        message = f"expected a path or a list of paths, got {quoted(files)}"
        raise RecipeError([Problem("data", message)])
    if not files:
        raise RecipeError([Problem("data", "no file is named")])
    for file in files:
        check_path("data", file)
    stems = Counter(Path(file).stem for file in files)
    rows: list[Conversation] = []
    for file in files:
        read, _ = read_path(str(file), seed=0)
        alike = stems[Path(file).stem] > 1
        rows += [replace(row, source_name=str(file)) for row in read] if alike else read
    return rows


def evaluate_rows(
    model: VisionLanguageNetwork,
    rows: Sequence[Conversation],
    settings: EvaluateSection,
    stage: Recipe | None,
    *,
    caches: bool | Literal["auto"],
    compile: bool | str = False,
    report: Report | None = None,
) -> Scores:
    """Answers rows, and scores the answers by the settings' metrics beside their baselines.

    Args:
        model: the model.
        rows: the rows to score.
        settings: the evaluation settings.
        stage: the recipe whose training rows the baselines read; None for none.
        caches: whether the tower's features are cached; auto: where there is room.
        compile: as `train.compile` in a recipe.
        report: called with `Features` and `Scoring` events.

    Raises:
        DataError: there are no rows, or a prompt is too long.
    """

    def computing(done: int, of: int) -> None:
        if report:
            report(Features(done, of))

    def answering(done: int, of: int) -> None:
        if report:
            report(Scoring(done, of))

    media = distinct_media(rows)
    cached = caches_images(model, media, caches)
    frames = distinct_frames(rows, model.processor.images) if cached else []
    features = tower_features(model, frames, computing) if cached else None
    options = score_options(settings, None if stage is None else stage.objective)
    started = time.perf_counter()
    scores = score(
        model,
        rows,
        **options,
        features=features,
        loss=False,
        compile=compile,
        progress=answering,
    )
    seconds = time.perf_counter() - started
    measured = assess(scores, settings.metrics)
    if settings.baselines != [] and options["answering"] != "retrieve":
        training = partial(_training, model, stage, settings)
        run = BaselineRun(model, rows, training, settings, seconds, caches, progress=answering)
        run.add(scores, measured)
    return scores


def _training(
    model: VisionLanguageNetwork, stage: Recipe | None, settings: EvaluateSection
) -> Training:
    """The training rows of a recipe's stage; none where there is no recipe or they are streamed.

    Raises `VlmTuneError` where they can't be read, or take long and no baseline is named.
    """
    if stage is None or stage.data.streaming:
        return Training()
    log.info("reading the training rows for baselines")
    few = settings.baselines == "auto"
    data = stage.data
    if few:
        prepared = find_prepared(data, data.train, model.processor, seed=stage.seed)
        if prepared is None:
            raise DataError(
                "the training part is not prepared in the cache; evaluate.baselines: [majority, "
                "...] prepares it"
            )
    else:
        (prepared,) = prepared_parts(data, "train", model.processor, stage.seed)
    return training_rows(prepared, few=few)
