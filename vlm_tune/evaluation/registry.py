"""The metrics that `evaluate.metrics` names, and those that rows of a form get by default.

A metric gives each row a vector of statistics that add up, and a score of summed ones: so the score
of any group of rows, its interval, and paired tests follow from one pass over the answers.

This module does not import torch.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import math
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vlm_tune.config.train import LOSS, EvaluateSection
from vlm_tune.data.sources.chat_schemas import CHAT_FORMS
from vlm_tune.errors import DataError, Problem, RecipeError
from vlm_tune.evaluation import captions, classes
from vlm_tune.evaluation.benchmarks import BENCHMARKS
from vlm_tune.evaluation.boxes import (
    box_overlap,
    boxes_in,
    points_close,
    points_in,
    points_in_boxes,
)
from vlm_tune.evaluation.choices import letter_place, names_choice
from vlm_tune.evaluation.intervals import Value
from vlm_tune.evaluation.metric import Metric, by_row
from vlm_tune.evaluation.metrics import Answer
from vlm_tune.evaluation.texts import anls, relaxed_match, vqa_accuracy, vqa_normalise
from vlm_tune.paths import shown_path
from vlm_tune.quoting import quoted, reason_of

LONG_ANSWER = 5
"""Words above which a chat's reference answer is scored by overlap too."""
SEVERAL = 10
"""Reference answers of a row, as VQAv2's have, from which `vqa_accuracy` is its default metric.

With fewer than four even an answer that equals all of them scores under 1.
"""
MAIN = ("text_recall_1", "box_iou", "point_accuracy", "chrf", "vqa_accuracy", "anls")
"""The default metrics that choose the best checkpoint where most rows are scored by one of them.

An exact match says little there: an answer that is nearly right counts as one that is not.
"""
LEAST_OVERLAP = 0.5
"""The intersection over union from which a box counts as right."""


def _each(score: Callable[[np.ndarray], float]) -> Value:
    """A score of one vector of sums, for arrays of them."""
    return lambda totals: np.apply_along_axis(score, -1, totals)


def _overlap(
    count: Callable[[Sequence[str], Sequence[Sequence[str]]], np.ndarray],
) -> Callable[[Sequence[Answer]], np.ndarray]:
    """Statistics of a function of answers and their references."""
    return lambda answers: count(
        [answer.generated for answer in answers], [answer.expectations for answer in answers]
    )


def _means(scores: np.ndarray) -> np.ndarray:
    return np.column_stack([scores, np.ones(len(scores))])


def _rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    return _means(captions.rouge_l(predictions, references))


def _cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    tokens = captions.tokens_of
    scores = captions.cider(
        [tokens(text) for text in predictions],
        [[tokens(text) for text in texts] for texts in references],
    )
    return _means(scores)


def _has_choices(answer: Answer) -> bool:
    return answer.references.chosen is not None


def _right_letter(answer: Answer) -> float:
    references = answer.references
    return float(letter_place(answer.generated, len(references.choices)) == references.chosen)


def _right_text(answer: Answer) -> float:
    references = answer.references
    assert references.chosen is not None  # as `_has_choices` says
    return float(names_choice(answer.generated, references.choices, references.chosen))


def _overlap_of_boxes(answer: Answer) -> float:
    return box_overlap(answer.generated, answer.expected)


def _has_boxes(answer: Answer) -> bool:
    return len(boxes_in(answer.expected)) > 0


def _point_in_box(answer: Answer) -> float:
    return points_in_boxes(answer.generated, answer.expected)


def _has_points(answer: Answer) -> bool:
    return answer.references.size is not None and len(points_in(answer.expected)) > 0


def _point_close(answer: Answer) -> float:
    assert answer.references.size is not None  # as `_has_points` says
    return points_close(answer.generated, answer.expected, answer.references.size)


def _perplexity(totals: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # of a model that diverged
        return np.exp(totals[..., 0] / totals[..., 1])


def _recall(sought: str, depth: int) -> Callable[[Sequence[Answer]], np.ndarray]:
    """Statistics of recall@`depth` of texts or images; each distinct query counts once."""

    def statistics(answers: Sequence[Answer]) -> np.ndarray:
        ranks = [answer.ranks for answer in answers]
        shares = np.array([getattr(each, f"{sought}_share") for each in ranks])
        hits = np.array([getattr(each, sought) <= depth for each in ranks])
        return np.column_stack([shares * hits, shares])

    return statistics


def _class_metric(name: str, title: str, value: Value) -> Metric:
    return Metric(
        name,
        title,
        lambda answers: classes.class_statistics(
            [(answer.generated, answer.expected) for answer in answers]
        ),
        value,
    )


_LISTED = (
    Metric("exact_match", "exact match", by_row(lambda answer: float(answer.correct))),
    Metric(
        "vqa_exact_match",
        "exact match (VQA's normalisation)",
        by_row(
            lambda answer: float(vqa_normalise(answer.generated) == vqa_normalise(answer.expected))
        ),
    ),
    Metric(
        "vqa_accuracy",
        "VQA accuracy (leave one out)",
        by_row(lambda answer: vqa_accuracy(answer.generated, answer.references.answers)),
        applies=lambda answer: len(answer.references.answers) > 1,
        needs="several reference `answers`",
    ),
    Metric(
        "relaxed_accuracy",
        "relaxed accuracy (5%)",
        by_row(
            lambda answer: float(
                any(relaxed_match(answer.generated, text) for text in answer.expectations)
            )
        ),
    ),
    Metric(
        "anls",
        "ANLS (0.5)",
        by_row(lambda answer: anls(answer.generated, answer.expectations)),
    ),
    Metric(
        "choice_letter",
        "multiple choice by letter",
        by_row(_right_letter),
        applies=_has_choices,
        needs="choices",
    ),
    Metric(
        "choice_text",
        "multiple choice by text",
        by_row(_right_text),
        applies=_has_choices,
        needs="choices",
    ),
    _class_metric("balanced_accuracy", "balanced accuracy", classes.macro(classes.recall)),
    _class_metric("precision_macro", "precision (macro)", classes.macro(classes.precision)),
    _class_metric("recall_macro", "recall (macro)", classes.macro(classes.recall)),
    _class_metric("f1_macro", "F1 (macro)", classes.macro(classes.f1)),
    _class_metric("precision_micro", "precision (micro)", classes.micro(classes.precision)),
    _class_metric("recall_micro", "recall (micro)", classes.micro(classes.recall)),
    _class_metric("f1_micro", "F1 (micro)", classes.micro(classes.f1)),
    Metric("bleu", "BLEU", _overlap(captions.bleu_statistics), _each(captions.bleu_score), top=100),
    Metric("chrf", "chrF", _overlap(captions.chrf_counts), _each(captions.chrf), top=100),
    Metric("rouge_l", "ROUGE-L", _overlap(_rouge)),
    Metric("cider", "CIDEr-D", _overlap(_cider), top=10),
    Metric(
        "box_iou",
        "box overlap (IoU)",
        by_row(_overlap_of_boxes),
        applies=_has_boxes,
        needs="a box in the reference answer",
    ),
    Metric(
        "box_accuracy",
        "boxes with IoU of 0.5",
        by_row(lambda answer: float(_overlap_of_boxes(answer) >= LEAST_OVERLAP)),
        applies=_has_boxes,
        needs="a box in the reference answer",
    ),
    Metric(
        "point_in_box",
        "points inside of the box",
        by_row(_point_in_box),
        applies=_has_boxes,
        needs="a box in the reference answer",
    ),
    Metric(
        "point_accuracy",
        "points within 5% of the diagonal",
        by_row(_point_close),
        applies=_has_points,
        needs="a point of its own type in the reference answer",
    ),
    Metric(
        "perplexity",
        "perplexity of the reference",
        lambda answers: np.array(
            [[answer.loss, answer.tokens] for answer in answers], dtype=np.float64
        ).reshape(-1, 2),
        _perplexity,
        applies=lambda answer: answer.tokens > 0,
        needs="the loss of its reference answer",
        top=None,
        log=True,
        lower_is_better=True,
    ),
)
RETRIEVAL = tuple(
    Metric(
        f"{sought}_recall_{depth}",
        f"recall@{depth} of {sought}s",
        _recall(sought, depth),
        applies=lambda answer: answer.ranks is not None,
        needs="a rank: retrieval compares images with captions",
    )
    for sought in ("text", "image")
    for depth in (1, 5, 10)
)
"""Recall@K of the captions of an image, and of the images of a caption."""
_OF_BENCHMARKS = [metric for benchmark in BENCHMARKS.values() for metric in benchmark.metrics]
METRICS: dict[str, Metric] = {
    metric.name: metric for metric in (*_LISTED, *RETRIEVAL, *_OF_BENCHMARKS)
}
"""All metrics by name; a recipe names those of `config.train.METRICS`, and benchmarks their own."""

BY_FORM: dict[str, tuple[str, ...]] = {
    "caption": ("bleu", "chrf", "rouge_l", "cider"),
    "classify": ("balanced_accuracy", "f1_macro"),
    "match": ("f1_macro",),
    "ocr": ("anls",),
    "translate": ("bleu", "chrf"),
    "retrieval": ("choice_text",),
}
"""What rows of a form are scored by besides exact match."""


def default_metrics(answer: Answer) -> tuple[str, ...]:
    """The metrics that a row is scored by where the recipe names none."""
    if answer.ranks is not None:
        return tuple(metric.name for metric in RETRIEVAL)
    references = answer.references
    if references.form in BENCHMARKS:
        return tuple(metric.name for metric in BENCHMARKS[references.form].metrics)
    names = ["exact_match", *BY_FORM.get(references.form, ())]
    if len(references.answers) > 1 and references.form == "vqa":
        names.append("vqa_accuracy" if len(references.answers) >= SEVERAL else "anls")
    if references.form == "multiple_choice":
        by_letter = letter_place(answer.expected, len(references.choices)) == references.chosen
        names.append("choice_letter" if by_letter else "choice_text")
    if references.form in CHAT_FORMS and len(answer.expected.split()) > LONG_ANSWER:
        names += ["chrf", "rouge_l"]
    if _has_boxes(answer):
        names += ["box_iou", "box_accuracy"]
    if _has_points(answer):
        names.append("point_accuracy")
    return tuple(names)


def main_metric(answers: Sequence[Answer], settings: EvaluateSection) -> str:
    """The metric, or `loss`, by which the best checkpoint is chosen.

    It is that of `best`, else the first of `metrics`, else the one of `MAIN` by which most of the
    rows are scored, else exact match.
    """
    if settings.best is not None:
        return settings.best
    if settings.metrics:
        return settings.metrics[0]
    names = Counter(name for answer in answers for name in default_metrics(answer))
    return next((name for name in MAIN if 2 * names[name] > len(answers)), "exact_match")


def lower_is_better(name: str) -> bool:
    """Whether less of a metric, or of the loss, is better; of a user's metric more is."""
    return name == LOSS or (name in METRICS and METRICS[name].lower_is_better)


# --- a user's own ---------------------------------------------------------------------------------


def find_metric(name: str) -> Metric:
    """The metric of a name, or the one that a function `module:function` computes.

    Raises `RecipeError` for a name that is neither, a module that can't be imported, and a function
    that is not there.
    """
    if name in METRICS:
        return METRICS[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"; did you mean {near[0]}?" if near else f": {', '.join(METRICS)}"
        message = f"{quoted(name)} is no metric, and no my_module:function{hint}"
        raise RecipeError([Problem("evaluate.metrics", message)])
    function = import_function(name, "evaluate.metrics")
    return Metric(name, name, by_row(_user_score(name, function)), top=None)


def import_function(name: str, key: str) -> Callable[..., Any]:
    """The function `module:function`, from the working folder or an installed package.

    Raises `RecipeError`, with the key that names it, where it can't be imported.
    """
    module_name, _, function_name = name.partition(":")
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, function_name, None)
    except KeyboardInterrupt:
        raise
    # A module may raise anything as it is imported, or end the process.
    except BaseException as error:
        reason = reason_of(error)
        if not isinstance(error, ImportError | SyntaxError):
            reason = f"{type(error).__name__}: {reason}"
        message = (
            f"{quoted(name)}: the module {quoted(module_name)} can't be imported from the working "
            f"folder or an installed package: {reason}"
        )
        raise RecipeError([Problem(key, message)]) from None
    finally:
        with contextlib.suppress(ValueError):  # the module may have changed the path
            sys.path.remove(folder)
    if not callable(function):
        message = f"{quoted(name)}: {module_name} has no function {quoted(function_name)}"
        raise RecipeError([Problem(key, message)])
    return function


def failure_of(error: BaseException) -> str:
    """The type, message and place of an error that a user's function raised.

    The place is the innermost line of the function's file that the error came through. To be called
    where the function was.
    """
    frames = traceback.extract_tb(error.__traceback__)[1:]
    lines = [frame.lineno for frame in frames if frame.filename == frames[0].filename]
    place = f" ({shown_path(frames[0].filename)}, line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {reason_of(error)}{place}"


def _user_score(name: str, function: Callable[..., Any]) -> Callable[[Answer], float]:
    """Calls a user's function for an answer; its faults become a `DataError` with the row."""

    def score(answer: Answer) -> float:
        try:
            number = float(function(answer.generated, list(answer.expectations), asdict(answer)))
        except KeyboardInterrupt:
            raise
        # A user's function may raise anything, or end the process.
        except BaseException as error:
            raise DataError(
                f"the metric {name} failed: {failure_of(error)}",
                source=answer.source,
                row=answer.id,
            ) from None
        if not math.isfinite(number):
            raise DataError(
                f"the metric {name} gave {number}, expected a finite number",
                source=answer.source,
                row=answer.id,
            )
        return number

    return score


def check_metrics(names: Sequence[str] | None) -> None:
    """Raises `RecipeError`, with every fault, for names that are no metrics."""
    problems = []
    for name in names or ():
        try:
            find_metric(name)
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
