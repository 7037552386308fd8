"""Baselines answer from the question, the tower's features, or without the image."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.helpers.tiny_models import built, parsed, rows_of
from vlm_tune.config.train import EvaluateSection
from vlm_tune.data.regions import Region
from vlm_tune.data.types import Conversation, Media, Message, References, distinct_media
from vlm_tune.errors import DataError, Interrupted
from vlm_tune.evaluation import baseline_run, baselines
from vlm_tune.evaluation.assessment import measure
from vlm_tune.evaluation.baseline_run import BaselineRun, Training, training_rows
from vlm_tune.evaluation.baselines import (
    Known,
    majority,
    mean_box,
    nearest,
    probe,
    probe_work,
    repeats,
    same_question,
)
from vlm_tune.evaluation.evaluate import score
from vlm_tune.evaluation.metrics import Scores
from vlm_tune.model.feature_cache import has_features, tower_features
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.vlm import VisionLanguageNetwork

COLOR, SHAPE, NEW = "what color?", "what shape?", "how many?"


def known(*pairs: tuple[str, str]) -> list[Known]:
    return [Known(question, answer) for question, answer in pairs]


def boxed(*boxes: tuple[float, ...], size: tuple[int, int] = (10, 10)) -> Conversation:
    regions = [Region(box, size) for box in boxes]
    return Conversation("1", (Message("user", ("Where?",)), Message("assistant", (*regions,))))


def test_the_mean_box_is_of_shares_of_images() -> None:
    training = [boxed((0, 0, 4, 4)), boxed((40, 40, 80, 100), size=(100, 100)), boxed((1, 2))]
    training.append(boxed((0, 0, 1, 1), (1, 1, 2, 2)))
    rows = [boxed((1, 1, 2, 2), size=(20, 10)), boxed((3, 4)), boxed()]
    assert mean_box(training, rows) == ["[4, 2, 12, 7]", "", ""]
    assert mean_box(training[2:], rows) == ["", "", ""]


def test_the_question_alone_answers() -> None:
    training = known((COLOR, "red"), (COLOR, "red"), (SHAPE, "circle"), (COLOR, "blue"))
    rows = known((SHAPE, "square"), (COLOR, "blue"), (NEW, "2"))
    assert majority(training, rows) == ["red"] * 3
    assert same_question(training, rows) == ["circle", "red", "red"]


def separable(rows: int = 60) -> tuple[list[Known], np.ndarray]:
    """Two questions about two kinds of images, whose features lie on two sides."""
    generator = np.random.default_rng(0)
    side = np.arange(rows) % 2
    features = np.column_stack([2.0 * side - 1, generator.normal(0, 0.3, (rows, 3))])
    texts = [("red", "circle"), ("blue", "square")]
    question = np.arange(rows) // 2 % 2
    training = [
        Known((COLOR, SHAPE)[which], texts[kind][which])
        for kind, which in zip(side.tolist(), question.tolist(), strict=True)
    ]
    return training, features


@pytest.mark.parametrize("answered", [nearest, probe])
def test_features_answer_each_question(answered: Callable[..., list[str]]) -> None:
    training, features = separable()
    rows = known((COLOR, ""), (SHAPE, ""), (COLOR, ""), (SHAPE, ""))
    places = np.array([[-3.0, 0, 0, 0], [-3.0, 0, 0, 0], [3.0, 0, 0, 0], [3.0, 0, 0, 0]])
    expected = ["red", "circle", "blue", "square"]
    assert answered(training, features, rows, places) == expected


def test_a_question_that_training_has_not_is_answered_from_all_rows() -> None:
    training = known((COLOR, "red"), (SHAPE, "circle"))
    features = np.array([[1.0, 0.0], [0.0, 1.0]])
    rows = known((NEW, "2"), (NEW, "2"))
    assert nearest(training, features, rows, features) == ["red", "circle"]


def test_a_probe_of_one_answer_gives_it() -> None:
    training = known((COLOR, "red"), (COLOR, "red"))
    assert probe(training, np.eye(2), known((COLOR, "x")), np.ones((1, 2))) == ["red"]


def test_answers_that_repeat_are_fit_for_a_probe() -> None:
    assert repeats(separable()[0])
    assert not repeats(known(*[(COLOR, str(number)) for number in range(20)]))
    training = separable()[0]
    both = known((COLOR, ""), (SHAPE, ""))
    assert probe_work(training, both, 10) == 2 * 2.0 * 300 * 10 * 30 * 2
    assert probe_work(training, both[:1], 10) == 2.0 * 300 * 10 * 30 * 2
    # A question that training has not takes a fit to all rows, with all four answers.
    assert probe_work(training, known((NEW, "")), 10) == 2.0 * 300 * 10 * 60 * 4


def test_similarities_are_computed_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    training, features = separable()
    rows = [replace(row, answer="") for row in training]
    expected = nearest(training, features, rows, features)
    monkeypatch.setattr(baselines, "SIMILARITIES", 100)
    assert nearest(training, features, rows, features) == expected


def test_an_empty_question_is_one_of_its_own() -> None:
    training = known(("", "red"), (COLOR, "blue"))
    features = np.array([[1.0, 0.0], [0.0, 1.0]])
    rows = known(("", ""), (NEW, ""))
    assert nearest(training, features, rows, features[[1, 1]]) == ["red", "blue"]


def test_phrasings_of_one_classification_are_one_question() -> None:
    references = References("classify", choices=("cat", "dog"), chosen=0)
    other = References("classify", choices=("dog", "cat"), chosen=1)
    rows = [
        Conversation(
            name, (Message("user", (text,)), Message("assistant", ("cat ",))), references=r
        )
        for name, text, r in (("a", "Which? cat, dog", references), ("b", "Pick one.", other))
    ]
    first, second = map(Known.of, rows)
    assert first == second and first.answer == "cat"


# --- with a model ---------------------------------------------------------------------------------


def run_of(
    model: VisionLanguageNetwork,
    rows: list[Conversation],
    training: list[Conversation],
    seconds: float = 1.0,
    caches: bool = True,
    **settings: object,
) -> Scores:
    scores = score(model, rows, decoding=Decoding(2), loss=False)
    section = EvaluateSection(max_new_tokens=2, **settings)  # type: ignore[arg-type]
    read = Training(training, distinct_media(training))
    measured, _ = measure(scores.answers, section.metrics)
    run = BaselineRun(model, rows, lambda: read, section, seconds, caches)
    run.add(scores, measured)
    return scores


def test_baselines_stand_beside_a_models_scores(tiny_recipe: Callable[..., str]) -> None:
    recipe = parsed(tiny_recipe("causal"))
    model = built(recipe)
    for parameter in model.tower.parameters():
        parameter.requires_grad_(False)
    rows = rows_of(recipe)
    scores = run_of(model, rows, rows)
    # The answers of eight rows hardly repeat, so there is no probe.
    assert list(scores.baselines) == ["majority", "same_question", "nearest", "blind"]
    for entries in scores.baselines.values():
        entry = entries["exact_match"]
        assert entry["n"] == len(rows) and entry["low"] <= entry["value"] <= entry["high"]
        assert entry["difference"] == pytest.approx(scores.accuracy - entry["value"])
    # The nearest image of a training image is itself.
    assert scores.baselines["nearest"]["exact_match"]["value"] == 1.0
    assert scores.baselines["majority"]["exact_match"]["value"] == 0.5


def test_the_blind_model_sees_no_image(
    tiny_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parsed(tiny_recipe("seq2seq"))
    model = built(recipe)
    rows = rows_of(recipe)
    scores = score(model, rows, decoding=Decoding(2), loss=False)
    blind_rows: list[Conversation] = []

    def fake(asking: object, given: list[Conversation], **named: object) -> list[str]:
        blind_rows.extend(given)
        return [row.messages[-1].text for row in rows]

    monkeypatch.setattr(baseline_run, "answer_rows", fake)
    settings = EvaluateSection(baselines=["blind"])
    measured, _ = measure(scores.answers, None)

    def read() -> Training:
        pytest.fail("training rows are read")

    run = BaselineRun(model, rows, read, settings, 1e6, caches=False)
    run.add(scores, measured)
    assert len(blind_rows) == len(rows)
    prompts = model.processor.prompts(blind_rows)
    assert not any(prompt.media or prompt.image_mask.any() for prompt in prompts)
    assert scores.baselines["blind"]["exact_match"]["value"] == 1.0
    assert scores.notes == ["baseline blind takes about 1,000,000 s"]


def test_what_is_not_cheap_is_left_out_with_its_cost(
    tiny_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parsed(tiny_recipe("causal"))
    model = built(recipe)
    for parameter in model.tower.parameters():
        parameter.requires_grad_(False)
    rows = rows_of(recipe)
    monkeypatch.setattr(BaselineRun, "_tower_seconds", lambda self, media: 500.0)
    scores = run_of(model, rows, rows, seconds=100.0)
    assert list(scores.baselines) == ["majority", "same_question"]
    assert scores.notes == [
        "baseline nearest left out: it takes about 500 s; "
        "evaluate.baselines: [..., nearest] computes it",
        "baseline blind left out: it takes about 100 s; "
        "evaluate.baselines: [..., blind] computes it",
    ]
    tower_features(model, distinct_media(rows))
    assert has_features(model, distinct_media(rows))
    assert "nearest" in run_of(model, rows, rows, seconds=100.0).baselines


def test_baselines_are_the_same_by_cached_features_and_without(
    tiny_recipe: Callable[..., str],
) -> None:
    recipe = parsed(tiny_recipe("causal"))
    model = built(recipe).train()
    rows = rows_of(recipe)
    images = distinct_media(rows)
    computed = run_of(model, rows, rows, caches=False, baselines=["nearest"])
    assert model.training and not has_features(model, images)
    tower_features(model, images)
    assert computed.baselines == run_of(model, rows, rows, baselines=["nearest"]).baselines


def test_images_that_the_prepared_part_names_otherwise_have_cached_features(
    tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parsed(tiny_recipe("causal"))
    model, rows = built(recipe), rows_of(recipe)
    moved = {
        item: Media(Path(shutil.copy(str(item.source), tmp_path / f"moved-{Path(item.name).name}")))
        for item in distinct_media(rows)
    }
    cached = run_of(model, rows, rows, caches=False, baselines=["nearest"])
    tower_features(model, distinct_media(rows))
    monkeypatch.setattr(BaselineRun, "_tower", lambda *_: pytest.fail("features are computed"))
    scores = score(model, rows, decoding=Decoding(2), loss=False)
    measured, _ = measure(scores.answers, None)
    settings = EvaluateSection(max_new_tokens=2, baselines=["nearest"])
    read = Training(rows, list(moved.values()))
    BaselineRun(model, rows, lambda: read, settings, 1e6, caches=True).add(scores, measured)
    assert scores.notes == []
    assert scores.baselines == cached.baselines


def test_named_baselines_that_can_not_be_computed_are_noted(
    tiny_recipe: Callable[..., str],
) -> None:
    recipe = parsed(tiny_recipe("causal"))
    model = built(recipe)
    text = Conversation("t", (Message("user", ("q",)), Message("assistant", ("no",))))
    rows = rows_of(recipe)
    scores = run_of(model, [text], [text], baselines=["majority", "nearest", "probe", "blind"])
    assert list(scores.baselines) == ["majority"]
    assert scores.notes == ["baselines nearest and probe need an image in every row"]
    scores = run_of(model, rows, rows, baselines=["probe"])
    assert scores.notes == ["baseline probe left out: training answers hardly repeat"]
    scores = run_of(model, rows, [], baselines=["majority"])
    assert scores.notes == ["baselines but blind need training rows, of which there are none"]


# --- what goes wrong ------------------------------------------------------------------------------


def few_shot(row: Conversation, shot: Conversation) -> Conversation:
    return replace(row, messages=(*shot.messages, *row.messages), shots=len(shot.messages))


def test_a_row_whose_only_image_is_an_examples_has_none(tiny_recipe: Callable[..., str]) -> None:
    recipe = parsed(tiny_recipe("causal"))
    model = built(recipe)
    rows = rows_of(recipe)
    text = Conversation("t", (Message("user", ("q",)), Message("assistant", ("no",))))
    shown = [*rows, few_shot(text, rows[0])]
    scores = run_of(model, rows, shown, baselines=["nearest"])
    assert scores.notes == ["baselines nearest and probe need an image in every row"]
    assert not scores.baselines
    rest = run_of(model, [few_shot(text, rows[0])], rows, baselines=["blind"])
    assert not rest.baselines


def fails(error: BaseException) -> Callable[..., Any]:
    def failing(*arguments: Any, **named: Any) -> Any:
        raise error

    return failing


def test_baselines_that_fail_leave_the_scores_and_the_others(
    tiny_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parsed(tiny_recipe("causal"))
    model = built(recipe)
    rows = rows_of(recipe)
    monkeypatch.setattr(baseline_run, "nearest", fails(ValueError("Input contains NaN")))
    monkeypatch.setattr(baseline_run, "answer_rows", fails(Interrupted("asked to stop")))
    scores = run_of(model, rows, rows, baselines=["majority", "nearest", "blind"])
    assert list(scores.baselines) == ["majority"]
    assert scores.notes == [
        "baseline nearest is left out: Input contains NaN",
        "baseline blind is left out: asked to stop",
    ]


def test_features_that_are_not_finite_give_no_baseline(
    tiny_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parsed(tiny_recipe("causal"))
    rows = rows_of(recipe)
    monkeypatch.setattr(
        BaselineRun, "_means", lambda self, rows, cached: np.full((len(rows), 2), np.nan)
    )
    scores = run_of(built(recipe), rows, rows, baselines=["nearest"])
    assert scores.notes == ["baseline nearest is left out: the tower's features are not finite"]


def test_features_that_are_only_averaged_are_not_stored(tiny_recipe: Callable[..., str]) -> None:
    recipe = parsed(tiny_recipe("causal"))
    model = built(recipe)
    rows = rows_of(recipe)
    assert "nearest" in run_of(model, rows[:4], rows, baselines=["nearest"]).baselines
    assert not has_features(model, distinct_media(rows))


def prepared_of(sizes: list[int]) -> Any:
    """A stand-in for prepared rows: the number of each is its place."""
    places = np.arange(sum(sizes))
    return SimpleNamespace(
        places=lambda part: places, conversations=lambda chosen: chosen.tolist(), media=[]
    )


def test_training_rows_are_drawn_from_all_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline_run, "MOST_ROWS", 100)
    monkeypatch.setattr(baseline_run, "MOST_READ", 1000)
    rows: Any = training_rows(prepared_of([800, 200]), few=True).rows
    assert len(rows) == 100 and rows == sorted(rows)
    assert 5 < sum(row >= 800 for row in rows) < 40
    # Rows may alternate between two questions.
    assert 30 < sum(row % 2 for row in rows) < 70
    assert training_rows(prepared_of([7]), few=True).rows == list(range(7))
    with pytest.raises(DataError, match="1,001 training rows takes long"):
        training_rows(prepared_of([1001]), few=True)
    assert len(training_rows(prepared_of([1001]), few=False).rows) == 100
