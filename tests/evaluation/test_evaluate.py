"""Exact match, scores by category, and the scores of several ranks joined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers.tiny_models import batch_of, built, loss_and_gradients, parsed, rows_of
from vlm_tune.data.types import Conversation, Message, References
from vlm_tune.errors import DataError
from vlm_tune.evaluation.evaluate import score
from vlm_tune.evaluation.metrics import Answer, Scores, join_scores
from vlm_tune.evaluation.texts import normalise
from vlm_tune.model.feature_cache import tower_features
from vlm_tune.model.language.decoding import Decoding


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Yes", "yes"),
        (" yes\n", "yes"),
        ("yes.", "yes"),
        ("a  red\tsquare", "a red square"),
        ("STRASSE", "straße"),
        ("ﬁve", "five"),
        ("\u00e9", "e\u0301"),
        ("２", "2"),
    ],
)
def test_texts_that_match(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("yes", "no"),
        ("yes", "yes yes"),
        ("", "no"),
        ("red", "reds"),
        ("1.5", "15"),
        ("a red square", "red square"),
        ("no!", "no"),
    ],
)
def test_texts_that_do_not_match(one: str, other: str) -> None:
    assert normalise(one) != normalise(other)


def answer(name: str, *, correct: bool, category: str = "", source: str = "a") -> Answer:
    return Answer(
        name, "image", "question", "yes", "yes" if correct else "no", correct, category, source
    )


def shard(loss: float | None, tokens: int, *answers: Answer) -> Scores:
    by_source = {answers[0].source: {"loss": loss, "tokens": tokens}} if loss is not None else {}
    return Scores(0.0, len(answers), loss, tokens, by_source=by_source, answers=list(answers))


def test_joined_scores_are_those_of_all_answers() -> None:
    """Rows of one file may have the same id too."""
    first = shard(
        2.0,
        10,
        answer("a", correct=True, category="color"),
        answer("b", correct=False, category="shape"),
    )
    second = shard(
        1.0,
        30,
        answer("c", correct=True, category="color"),
        answer("a", correct=True, category="color"),
    )
    scores = join_scores([first, second])
    assert (scores.n, scores.accuracy) == (4, 3 / 4)
    assert scores.loss == pytest.approx((2.0 * 10 + 1.0 * 30) / 40)
    assert scores.tokens == 40
    assert scores.by_category == {
        "color": {"accuracy": 1.0, "n": 3},
        "shape": {"accuracy": 0.0, "n": 1},
    }
    assert scores.by_source == {"a": {"accuracy": 3 / 4, "n": 4, "loss": scores.loss, "tokens": 40}}
    assert join_scores([shard(None, 0, answer("a", correct=False))]).loss is None


def test_scores_of_ranks_are_joined_by_source() -> None:
    """Rows of two files may have the same id, and are two questions."""
    first = shard(2.0, 10, answer("x", correct=True, source="a"))
    second = shard(1.0, 30, answer("x", correct=False, source="b"))
    scores = join_scores([first, second])
    assert scores.by_source == {
        "a": {"accuracy": 1.0, "n": 1, "loss": 2.0, "tokens": 10},
        "b": {"accuracy": 0.0, "n": 1, "loss": 1.0, "tokens": 30},
    }
    assert (scores.n, scores.accuracy, scores.loss) == (2, 0.5, pytest.approx(50 / 40))


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_scores_of_a_model(
    kind: str, tiny_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every answer is compared with its own question's."""
    recipe = parsed(tiny_recipe(kind))
    model = built(recipe)
    rows = [
        replace(row, category="color" if place % 2 == 0 else "yes_no")
        for place, row in enumerate(rows_of(recipe))
    ]
    long = Conversation(
        "long", (Message("user", ("word " * 20,)), Message("assistant", ("Word",))), "text"
    )
    rows.insert(3, long)
    answers: dict[str, str] = {row.id: row.messages[-1].text.upper() + ". " for row in rows}
    answers[rows[0].id] = "wrong"

    def fake(asking: Any, prompts: Any, decoding: Decoding, **named: Any) -> list[str]:
        assert asking is model and not model.training and named["batch_size"] == 4
        named["progress"](len(prompts), len(prompts))
        return [answers[prompt.id] for prompt in prompts]

    monkeypatch.setattr("vlm_tune.evaluation.answering.answer_prompts", fake)
    steps: list[tuple[int, int]] = []
    model.train()
    scores = score(
        model,
        rows,
        decoding=Decoding(4),
        batch_size=4,
        progress=lambda done, of: steps.append((done, of)),
    )
    assert model.training
    assert steps == [(9, 9)]
    assert (scores.n, scores.accuracy) == (9, 8 / 9)
    assert scores.by_category == {
        "color": {"accuracy": 3 / 4, "n": 4},
        "text": {"accuracy": 1.0, "n": 1},
        "yes_no": {"accuracy": 1.0, "n": 4},
    }
    assert [one.id for one in scores.answers] == [row.id for row in rows]
    assert [one.id for one in scores.answers if not one.correct] == [rows[0].id]
    assert scores.answers[0].question == "what color is it?"
    assert scores.answers[0].image.endswith("red.png")
    assert (scores.answers[0].expected, scores.answers[0].generated) == ("red", "wrong")
    assert "answers" not in scores.summary()


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_the_loss_is_the_mean_over_the_references_tokens(
    kind: str, tiny_recipe: Callable[..., str]
) -> None:
    recipe = parsed(tiny_recipe(kind))
    model = built(recipe)
    rows = rows_of(recipe)
    features = tower_features(
        model, list(dict.fromkeys(item for row in rows for item in row.media))
    )
    scores = [
        score(model, rows, decoding=Decoding(2), batch_size=size, features=stored)
        for size, stored in ((3, None), (8, features))
    ]
    batch = batch_of(
        model.eval(), [example for row in rows for example in model.processor.examples(row)]
    )
    expected = float(loss_and_gradients(model, [batch])[0]) / batch.supervised
    for scored in scores:
        assert scored.loss == pytest.approx(expected, rel=1e-5)
        assert scored.tokens == batch.supervised
    assert [one.generated for one in scores[0].answers] == [
        one.generated for one in scores[1].answers
    ]
    assert score(model, rows, decoding=Decoding(2), loss=False).loss is None


def test_no_rows_and_prompts_that_are_too_long_are_errors(tiny_recipe: Callable[..., str]) -> None:
    recipe = parsed(tiny_recipe("causal"))
    model = built(recipe)
    with pytest.raises(DataError, match="no rows to evaluate"):
        score(model, [], decoding=Decoding(2))
    long = Conversation(
        "the long one", (Message("user", ("word " * 200,)), Message("assistant", ("no",)))
    )
    with pytest.raises(DataError, match=r"the long one: \d+ tokens, more than 128"):
        score(model, [long], decoding=Decoding(2))


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
@torch.no_grad()
def test_beams_and_batches_give_one_rows_answer(kind: str, tiny_recipe: Callable[..., str]) -> None:
    recipe = parsed(tiny_recipe(kind))
    model = built(recipe)
    for parameter in model.llm.parameters():
        parameter.data.mul_(2)
    rows = rows_of(recipe)
    for decoding in (Decoding(5), Decoding(5, 3)):
        together = [
            one.generated
            for one in score(model, rows, decoding=decoding, batch_size=8, loss=False).answers
        ]
        alone = [
            one.generated
            for one in score(model, rows, decoding=decoding, batch_size=1, loss=False).answers
        ]
        assert together == alone
        assert len(set(together)) > 1


def test_an_answer_names_its_rows_image_and_no_long_lists(tiny_recipe: Callable[..., str]) -> None:
    recipe = parsed(tiny_recipe("causal"))
    first, _, second = rows_of(recipe)[:3]
    shot = replace(second, messages=(*first.messages, *second.messages), shots=2)
    choices = tuple(f"class {number}" for number in range(1000))
    classes = replace(first, references=References("classify", choices=choices, chosen=0))
    scores = score(built(recipe), [shot, classes], decoding=Decoding(1), loss=False)
    assert [answer.image for answer in scores.answers] == [
        second.media[0].name,
        first.media[0].name,
    ]
    assert scores.answers[1].references == References("classify")
    assert "answers" not in scores.summary()
