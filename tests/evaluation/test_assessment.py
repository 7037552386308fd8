"""Metrics are chosen by the rows' form or by name, and computed overall and for groups."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from rich.console import Console

from tests.helpers.tiny_models import built, parsed, rows_of
from vlm_tune.config.train import METRICS as NAMES
from vlm_tune.config.train import Baseline, EvaluateSection
from vlm_tune.data.types import Conversation, Media, Message, References
from vlm_tune.errors import RecipeError
from vlm_tune.evaluation.answer_files import load_answers, save_answers
from vlm_tune.evaluation.assessment import assess, better, clusters_of, compare_answers, measure
from vlm_tune.evaluation.baselines import TITLES
from vlm_tune.evaluation.benchmarks import BENCHMARKS
from vlm_tune.evaluation.evaluate import row_answers, score
from vlm_tune.evaluation.metrics import Answer, Scores, scores
from vlm_tune.evaluation.registry import (
    METRICS,
    check_metrics,
    default_metrics,
    find_metric,
    main_metric,
)
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.rendering.scores_text import score_tables


def answer(
    number: int, generated: str, expected: str = "yes", form: str = "vqa", **changes: Any
) -> Answer:
    image = f"{number // 2}.png"
    references = References(form, **changes)
    right = generated == expected
    return Answer(
        str(number), image, "q", expected, generated, right, "", "a", (image,), references
    )


def assessed(answers: list[Answer], names: list[str] | None = None) -> Scores:
    scored = scores(answers, {})
    assess(scored, names)
    return scored


def test_recipes_name_the_metrics_and_baselines_that_there_are() -> None:
    benchmarked = [metric.name for each in BENCHMARKS.values() for metric in each.metrics]
    assert list(METRICS) == [*NAMES, *benchmarked]
    assert tuple(TITLES) == get_args(Baseline)


@pytest.mark.parametrize(
    ("row", "names"),
    [
        (answer(0, "yes"), ()),
        (answer(0, "yes", answers=("yes", "no")), ("anls",)),
        (answer(0, "yes", answers=("yes",) * 10), ("vqa_accuracy",)),
        (answer(0, "a", "a", "caption"), ("bleu", "chrf", "rouge_l", "cider")),
        (answer(0, "a", "a", "classify"), ("balanced_accuracy", "f1_macro")),
        (answer(0, "a", "a", "ocr"), ("anls",)),
        (answer(0, "a", "a", "translate"), ("bleu", "chrf")),
        (answer(0, "B", "B", "multiple_choice", choices=("x", "y"), chosen=1), ("choice_letter",)),
        (answer(0, "y", "y", "multiple_choice", choices=("x", "y"), chosen=1), ("choice_text",)),
        (answer(0, "y", "y", "retrieval", choices=("x", "y"), chosen=1), ("choice_text",)),
        (answer(0, "", "a b c d e f", "llava"), ("chrf", "rouge_l")),
        (answer(0, "", "short", "messages"), ()),
        (answer(0, "", "[1, 2, 3, 4]", "llava"), ("box_iou", "box_accuracy")),
    ],
)
def test_a_rows_form_chooses_its_metrics(row: Answer, names: tuple[str, ...]) -> None:
    assert default_metrics(row) == ("exact_match", *names)


@pytest.mark.parametrize(
    ("forms", "settings", "name"),
    [
        (["messages", "ocr"], {}, "exact_match"),
        (["messages", "ocr", "ocr"], {}, "anls"),
        (["caption", "caption", "vqa"], {}, "chrf"),
        (["ocr"], {"metrics": ["rouge_l", "anls"]}, "rouge_l"),
        (["ocr"], {"metrics": ["rouge_l", "anls"], "best": "loss"}, "loss"),
    ],
)
def test_one_metric_chooses_the_best_checkpoint(
    forms: list[str], settings: dict[str, Any], name: str
) -> None:
    answers = [answer(number, "yes", form=form) for number, form in enumerate(forms)]
    assert main_metric(answers, EvaluateSection(**settings)) == name


def test_each_metric_scores_the_rows_that_it_fits() -> None:
    answers = [
        answer(0, "yes"),
        answer(1, "no", answers=("yes",) * 7 + ("no",) * 3),
        answer(2, "a cat", "a dog", "caption"),
        answer(3, "a dog", "a dog", "caption"),
    ]
    metrics = assessed(answers).metrics
    counts = {name: (entry["n"], entry["images"]) for name, entry in metrics.items()}
    assert counts == {
        "exact_match": (4, 2),
        "vqa_accuracy": (1, 1),
        **dict.fromkeys(("bleu", "chrf", "rouge_l", "cider"), (2, 1)),
    }
    assert metrics["exact_match"]["value"] == 0.5
    assert metrics["vqa_accuracy"]["value"] == pytest.approx((7 + 2 / 3 * 3) / 10)
    assert metrics["vqa_accuracy"]["low"] is None


def test_groups_have_their_own_scores_and_intervals() -> None:
    answers = [answer(number, "yes" if number < 5 else "no") for number in range(12)]
    answers = [
        replace(row, source="a" if number < 6 else "b", category="c" if number % 2 else "")
        for number, row in enumerate(answers)
    ]
    scored = assessed(answers, ["exact_match", "balanced_accuracy"])
    first, second = (scored.by_source[name]["metrics"]["exact_match"] for name in "ab")
    assert (first["value"], first["n"], first["images"]) == (pytest.approx(5 / 6), 6, 3)
    assert (second["value"], second["n"]) == (0.0, 6)
    assert first["low"] < 5 / 6 < first["high"] and second["low"] == 0 < second["high"]
    assert scored.by_category.keys() == {"c"}
    assert scored.by_category["c"]["metrics"]["balanced_accuracy"]["n"] == 6
    assert scored.accuracy == scored.metrics["exact_match"]["value"]


def test_a_metric_that_fits_no_row_is_named_with_the_reason() -> None:
    scored = assessed([answer(0, "yes")], ["exact_match", "vqa_accuracy", "perplexity"])
    assert scored.skipped == {
        "vqa_accuracy": "no row has several reference `answers`",
        "perplexity": "no row has the loss of its reference answer",
    }
    assert scored.summary().keys() >= {"metrics", "skipped"}


def test_answers_of_another_model_are_compared_row_by_row() -> None:
    right = [answer(number, "yes") for number in range(8)]
    wrong = [replace(row, generated="no", correct=False) for row in right]
    measured, _ = measure(right, None)
    entries, skipped = compare_answers(measured, clusters_of(right), wrong)
    entry = entries["exact_match"]
    assert not skipped
    assert (entry["value"], entry["difference"], entry["images"]) == (0.0, 1.0, 4)
    assert entry["p"] == 2 / 16 and better("exact_match", entry) is None
    assert better("exact_match", {**entry, "p": 0.01}) is True
    assert better("perplexity", {**entry, "p": 0.01}) is False


def test_a_metric_that_is_named_twice_counts_once() -> None:
    entry = assessed([answer(0, "yes"), answer(1, "no")], ["anls", "anls"]).metrics["anls"]
    assert (entry["n"], entry["value"]) == (2, 0.5)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e6])
def test_a_score_that_is_not_finite_is_none(loss: float) -> None:
    rows = [replace(answer(number, "yes"), loss=loss, tokens=2) for number in range(6)]
    usual = [replace(row, loss=1.0 + number) for number, row in enumerate(rows)]
    entry = assessed(rows, ["perplexity"]).metrics["perplexity"]
    assert (entry["value"], entry["low"], entry["high"]) == (None, None, None)
    measured, _ = measure(rows, ["perplexity"])
    compared = compare_answers(measured, clusters_of(rows), usual)[0]["perplexity"]
    assert compared["value"] is not None and compared["p"] is None
    assert compared["difference"] is None and better("perplexity", compared) is None
    json.dumps(compared, allow_nan=False)


def test_the_answer_that_is_trained_on_is_a_reference() -> None:
    assert answer(0, "yes", answers=("no", "maybe")).expectations == ("yes", "no", "maybe")
    assert answer(0, "yes", answers=("no", " yes ")).expectations == ("no", " yes ")


# --- a user's own ---------------------------------------------------------------------------------

SCORE = """
def score(prediction, references, row):
    return len(prediction) + len(references) + (row["references"]["form"] == "vqa")


def broken(prediction, references, row):
    return 1 / 0


def leaving(prediction, references, row):
    raise SystemExit(3)


def picky(prediction, references, row):
    return prediction[0] == "y"


def endless(prediction, references, row):
    return float("inf")


number = 5
"""


@pytest.fixture
def own_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the working folder, which no other test imports."""
    name = f"metric_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(SCORE)
    (tmp_path / f"{name}_raises.py").write_text("1 / 0")
    (tmp_path / f"{name}_leaves.py").write_text("import sys; sys.path.pop(0); sys.exit(3)")
    monkeypatch.chdir(tmp_path)
    return name


def test_a_users_function_scores_each_row(own_metric: str) -> None:
    name = f"{own_metric}:score"
    entry = assessed([answer(number, "yes") for number in range(4)], [name]).metrics[name]
    assert (entry["value"], entry["low"], entry["high"]) == (5.0, 5.0, 5.0)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("broken", "failed: ZeroDivisionError: division by zero ({place})"),
        ("leaving", "failed: SystemExit: 3 ({place})"),
        ("endless", "gave inf, expected a finite number"),
    ],
)
def test_a_users_function_that_fails_leaves_the_other_scores(
    function: str, message: str, own_metric: str
) -> None:
    name = f"{own_metric}:{function}"
    scored = assessed([answer(7, "yes")], [name, "exact_match"])
    assert scored.metrics.keys() == {"exact_match"}
    body = SCORE.split("\n")
    line = next(n for n, text in enumerate(body) if text.startswith(f"def {function}(")) + 2
    message = message.format(place=f"{Path.cwd() / own_metric}.py, line {line}")
    assert scored.skipped == {name: f"a, row 7: the metric {name} {message}"}


def test_a_users_function_that_fails_on_other_answers_is_skipped_there(own_metric: str) -> None:
    name = f"{own_metric}:picky"
    right = [answer(number, "yes") for number in range(4)]
    measured, _ = measure(right, [name, "exact_match"])
    empty = [replace(row, generated="") for row in right]
    entries, skipped = compare_answers(measured, clusters_of(right), empty)
    assert entries.keys() == {"exact_match"} and "IndexError" in skipped[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact", "'exact' is no metric, and no my_module:function; did you mean exact_match"),
        ("zzz", "and no my_module:function: exact_match, vqa_exact_match"),
        ("no_such_module_here:score", "can't be imported .*: No module named"),
        ("{own}_raises:score", "can't be imported .*: division by zero"),
        ("{own}_leaves:score", "can't be imported .*: 3"),
        ("{own}:nothing", "has no function 'nothing'"),
        ("{own}:number", "has no function 'number'"),
        (":score", "can't be imported"),
    ],
)
def test_names_that_are_no_metrics_are_refused(name: str, message: str, own_metric: str) -> None:
    with pytest.raises(RecipeError, match=message):
        find_metric(name.format(own=own_metric))


def test_every_bad_name_is_reported() -> None:
    with pytest.raises(RecipeError) as caught:
        check_metrics(["exact_match", "one", "two"])
    assert len(caught.value.problems) == 2
    check_metrics(None)


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_perplexity_is_that_of_the_loss(kind: str, tiny_recipe: Callable[..., str]) -> None:
    recipe = parsed(tiny_recipe(kind))
    model = built(recipe)
    rows = rows_of(recipe)
    plain = score(model, rows, decoding=Decoding(2), batch_size=3)
    scored = score(model, rows, decoding=Decoding(2), batch_size=3, loss=False, perplexity=True)
    assess(scored, ["perplexity"])
    entry = scored.metrics["perplexity"]
    assert plain.loss is not None
    assert entry["value"] == pytest.approx(math.exp(plain.loss), rel=1e-5)
    assert entry["low"] < entry["value"] < entry["high"]
    assert sum(one.tokens for one in scored.answers) == plain.tokens


@pytest.mark.parametrize("modality", ["image", "video", "audio"])
def test_scores_on_videos_and_clips_say_so(modality: Any, tmp_path: Path) -> None:
    """So that tables do not call them images; those on images are as they were."""
    media = Media(b"x", of_video=True) if modality == "video" else Media(b"x", modality)
    turns = (Message("user", (media, "q")), Message("assistant", ("a",)))
    answers = row_answers([Conversation("row", turns)], ["a"])
    save_answers(tmp_path / "answers.jsonl", answers)
    for each in (answers, load_answers(tmp_path / "answers.jsonl")):
        summary = scores(each, {}).summary()
        assert summary.get("modality", "image") == modality
    assert ("modality" in (tmp_path / "answers.jsonl").read_text()) == (modality != "image")
    entry = {"value": 1.0, "low": None, "high": None, "n": 1, "images": 1}
    paired = {"difference": 0.5, "difference_low": None, "difference_high": None, "p": None}
    summary["metrics"] = {"exact_match": entry}
    summary["baselines"] = {"blind": {"exact_match": entry | paired}, "nearest": {}}
    console = Console(file=io.StringIO(), width=200)
    for table in score_tables(summary):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("clips" in text, "images" in text) == (modality == "audio", modality == "image")
    noun = {"audio": "the clip", "video": "the video", "image": "image"}[modality]
    assert f"model without {noun}" in text
