"""A whole evaluation of a loaded model: answers, metrics, intervals and baselines."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from vlm_tune.config.recipe import Recipe
from vlm_tune.config.train import Baseline, EvaluateSection
from vlm_tune.data.prepare.run import prepared_parts
from vlm_tune.data.sources.registry import read_path
from vlm_tune.data.types import Conversation, distinct_media
from vlm_tune.errors import Problem, RecipeError, VlmTuneError
from vlm_tune.evaluation.assessment import assess
from vlm_tune.evaluation.baseline_run import BaselineRun, Training, training_rows
from vlm_tune.evaluation.evaluate import score
from vlm_tune.evaluation.metrics import Scores
from vlm_tune.evaluation.registry import check_metrics
from vlm_tune.events import Features, Report, Scoring
from vlm_tune.model.feature_cache import tower_features
from vlm_tune.model.feature_choice import caches_images
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.paths import check_path
from vlm_tune.quoting import quoted

log = logging.getLogger(__name__)


def chosen_settings(
    settings: EvaluateSection,
    metrics: Sequence[str] | None,
    baselines: Literal["auto"] | Sequence[str] | None,
) -> EvaluateSection:
    """The settings with the metrics and baselines of a call, where it names some.

    Raises `RecipeError` for a name that is none.
    """
    changes: dict[str, Any] = {}
    for option, names in (("metrics", metrics), ("baselines", baselines)):
        if names is None:
            continue
        automatic = option == "baselines" and names == "auto"
        listed = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
        if not automatic and not listed:
            message = f"expected a list of names, not {quoted(names)}"
            raise RecipeError([Problem(f"--{option}", message)])
        changes[option] = names if automatic else list(names)
    if metrics is not None and not metrics:
        raise RecipeError([Problem("--metrics", "no metric is named")])
    given = changes.get("baselines", "auto")
    for name in given if given != "auto" else ():
        if name not in get_args(Baseline):
            message = f"{quoted(name)} is none of {', '.join(get_args(Baseline))}"
            raise RecipeError([Problem("--baselines", message)])
    chosen = settings.model_copy(update=changes)
    check_metrics(chosen.metrics)
    return chosen


def read_files(data: str | Path | Sequence[str | Path]) -> list[Conversation]:
    """The rows of a file or of several; those of one name are told apart by their paths in scores.

    Raises `DataError` for the first row that can't be used, `RecipeError` for a file that is no
    path, and for no files.
    """
    several = isinstance(data, Sequence) and not isinstance(data, str)
    files: list[Any] = [*data] if several else [data]  # type: ignore[misc]
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
        DataError: there are no rows, a prompt is too long, or a user's own metric failed.
    """

    def computing(done: int, of: int) -> None:
        if report:
            report(Features(done, of))

    def answering(done: int, of: int) -> None:
        if report:
            report(Scoring(done, of))

    media = distinct_media(rows)
    cached = caches_images(model, media, caches)
    features = tower_features(model, media, computing) if cached else None
    started = time.perf_counter()
    scores = score(
        model,
        rows,
        decoding=Decoding(settings.max_new_tokens, settings.num_beams),
        batch_size=settings.batch_size,
        features=features,
        loss=False,
        perplexity="perplexity" in (settings.metrics or ()),
        compile=compile,
        progress=answering,
    )
    seconds = time.perf_counter() - started
    assess(scores, settings.metrics)
    if settings.baselines != []:
        training = _training(model, stage, settings, scores)
        BaselineRun(model, rows, training, settings, seconds, caches, progress=answering).add(
            scores
        )
    return scores


def _training(
    model: VisionLanguageNetwork, stage: Recipe | None, settings: EvaluateSection, scores: Scores
) -> Training:
    """The training rows of a recipe's stage; none, with a note, where they can't be read."""
    if stage is None or stage.data.streaming or settings.baselines == ["blind"]:
        return Training()
    log.info("reading the training rows for baselines")
    try:
        (prepared,) = prepared_parts(stage.data, "train", model.processor, stage.seed)
        return training_rows(prepared)
    except VlmTuneError as error:
        reason = str(error).splitlines()[0]
        scores.notes.append(f"no baselines from training rows, which can't be read: {reason}")
        return Training()
