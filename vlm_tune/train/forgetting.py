"""Scores on rows of other tasks before and after training: how much a model forgets.

The rows are files that `evaluate.also` names. The model as the run starts answers them first, the
finished one last, and the two are compared row by row. Rank 0 does both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_tune.config.recipe import Recipe
from vlm_tune.data.types import Conversation
from vlm_tune.evaluation.answer_files import load_answers, save_answers
from vlm_tune.evaluation.compare import compare
from vlm_tune.evaluation.evaluate import score, score_options
from vlm_tune.evaluation.evaluate_rows import read_files
from vlm_tune.evaluation.metrics import Answer
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.quoting import reason_of
from vlm_tune.run_folder import ALSO

Progress = Callable[[int, int], None]

log = logging.getLogger(__name__)


def other_rows(recipe: Recipe) -> dict[str, list[Conversation]]:
    """The rows of each file that `evaluate.also` names, as many as `test_limit` says.

    Raises `DataError` for a file that can't be used.
    """
    return {name: _rows(path, recipe) for name, path in recipe.evaluate.also.items()}


def answer_before(
    run: Path,
    model: VisionLanguageNetwork,
    recipe: Recipe,
    rows: Mapping[str, Sequence[Conversation]],
    progress: Progress,
) -> None:
    """Writes the answers of the model as the run starts."""
    for name, of_task in rows.items():
        log.info("answering %s before training", name)
        path = _file(run, name, "before")
        path.parent.mkdir(exist_ok=True)
        save_answers(path, _answers(model, recipe, of_task, progress))


def compare_after(
    run: Path, model: VisionLanguageNetwork, recipe: Recipe, progress: Progress
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The scores of the finished model beside those before training.

    Returns:
        {name: {n, metrics, skipped}} with `metrics` as in `Comparison`, `first` being before and
        `second` after training; and a note for each task that could not be scored.
    """
    compared: dict[str, dict[str, Any]] = {}
    notes = []
    for name, path in recipe.evaluate.also.items():
        log.info("answering %s after training", name)
        try:
            after = _answers(model, recipe, _rows(path, recipe), progress)
            save_answers(_file(run, name, "after"), after)
            before = load_answers(_file(run, name, "before"))
            comparison = compare(
                before,
                after,
                names=("before training", "after training"),
                metrics=recipe.evaluate.metrics,
            )
        # Whatever goes wrong, also a stop of the run: the model is trained and saved.
        except Exception as error:
            notes.append(f"{name} is not compared with before training: {reason_of(error)}")
            continue
        compared[name] = {
            "n": comparison.n,
            "metrics": comparison.metrics,
            "skipped": comparison.skipped,
        }
    return compared, notes


def _file(run: Path, name: str, when: str) -> Path:
    return run / ALSO / f"{name}-{when}.jsonl"


def _rows(path: str, recipe: Recipe) -> list[Conversation]:
    return read_files(path)[: recipe.evaluate.test_limit]


def _answers(
    model: VisionLanguageNetwork,
    recipe: Recipe,
    rows: Sequence[Conversation],
    progress: Progress,
) -> list[Answer]:
    options = score_options(recipe.evaluate, None)
    return score(model, rows, **options, loss=False, progress=progress).answers
