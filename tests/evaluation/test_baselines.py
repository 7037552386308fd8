"""Baselines answer from the question, the tower's features, or without the image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.helpers.tiny_models import built, parsed, rows_of
from vlm_tune.config.train import EvaluateSection
from vlm_tune.data.types import Conversation, Message, References, distinct_media
from vlm_tune.evaluation import baseline_run
from vlm_tune.evaluation.baseline_run import BaselineRun, Training
from vlm_tune.evaluation.baselines import (
    Known,
    majority,
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
    assert probe_work(separable()[0], 10) == 2 * 2.0 * 300 * 10 * 30 * 2


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
    media = distinct_media(training)
    BaselineRun(model, rows, Training(training, media), section, seconds, caches).add(scores)
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
    prompts = []

    def fake(asking: object, asked_prompts: list, decoding: object, **named: object) -> list[str]:
        prompts.extend(asked_prompts)
        return [row.messages[-1].text for row in rows]

    monkeypatch.setattr(baseline_run, "answer_prompts", fake)
    settings = EvaluateSection(baselines=["blind"])
    BaselineRun(model, rows, Training(), settings, 1e6, caches=False).add(scores)
    assert len(prompts) == len(rows)
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


def test_without_a_cache_baselines_compute_features_and_store_none(
    tiny_recipe: Callable[..., str],
) -> None:
    recipe = parsed(tiny_recipe("causal"))
    model = built(recipe).train()
    rows = rows_of(recipe)
    images = distinct_media(rows)
    computed = run_of(model, rows, rows, caches=False, baselines=["nearest"])
    assert model.training and not has_features(model, images)
    assert computed.baselines == run_of(model, rows, rows, baselines=["nearest"]).baselines
    assert has_features(model, images)


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
