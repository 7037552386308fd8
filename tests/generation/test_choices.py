"""Answers limited to choices: the probabilities are those of scoring each choice by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tests.helpers.connector_kinds import with_connector
from tests.helpers.talkative import talkative
from tests.helpers.tiny_models import png
from vlm_tune.config.tune import TuneRule
from vlm_tune.data.batching.collate import collate
from vlm_tune.errors import ArgumentError, DataError
from vlm_tune.generation import choices as choosing
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.generation.choices import answered, choice_rows
from vlm_tune.generation.requests import request_conversation
from vlm_tune.model.tuning import apply_rules

Recipes = Callable[..., str]
both_llms = pytest.mark.parametrize("llm", ["causal", "seq2seq"])
RED, BLUE = png((200, 30, 30)).source, png((30, 30, 200)).source
COLORS = ["red", "blue", "dark green", "red and blue", "no"]
REQUESTS: list[Any] = [
    {"prompt": "what color is it?", "image": RED},
    {"prompt": "which one?", "image": RED},
    {"prompt": "which one?", "image": BLUE},
    "no image, which color?",
    {
        "messages": [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hi"},
            {"role": "user", "content": "<image> and this?"},
        ],
        "image": BLUE,
    },
]


@torch.no_grad()
def one_by_one(model: VisionLanguageModel, request: Any, texts: Sequence[str]) -> list[float]:
    """Probabilities of choices by the loss of each as the answer, in a row of its own."""
    examples = answered(model, request_conversation(1, request), texts)
    losses: list[Any] = [
        model(collate([each], model.processor.spec, fetch=model.processor.images))
        for each in examples
    ]
    return torch.stack([-loss.sum for loss in losses]).double().softmax(0).tolist()


@both_llms
def test_probabilities_are_those_of_each_choice_by_itself(llm: str, tiny_recipe: Recipes) -> None:
    model = talkative(tiny_recipe(llm))
    answers = model.answer_batch(REQUESTS, choices=COLORS)
    for request, answer in zip(REQUESTS, answers, strict=True):
        expected = one_by_one(model, request, COLORS)
        assert answer.probabilities is not None and list(answer.probabilities) == COLORS
        assert list(answer.probabilities.values()) == pytest.approx(expected, abs=1e-5)
        assert sum(answer.probabilities.values()) == pytest.approx(1)
        assert answer.text == COLORS[expected.index(max(expected))]
        assert model.processor.decode(answer.ids) == answer.text
        assert answer.logprobs is not None and len(answer.logprobs) == len(answer.ids) + 1
        alone = model.answer_batch([request], choices=COLORS)[0].probabilities
        assert alone == pytest.approx(answer.probabilities, abs=1e-5)
    assert model.chat_batch(REQUESTS, choices=COLORS) == [answer.text for answer in answers]
    assert len({answer.text for answer in answers}) > 1 or llm == "seq2seq"


def test_each_request_may_have_choices_of_its_own(tiny_recipe: Recipes) -> None:
    model = talkative(tiny_recipe("causal"))
    lists = [["a", "b"], ["b", "c", "d"], ["a", "b"], ["yes", "no"], ["no", "yes"]]
    answers = model.answer_batch(REQUESTS, choices=lists)
    assert [list(answer.probabilities or ()) for answer in answers] == lists
    assert model.chat(messages=REQUESTS[4]["messages"], images=BLUE, choices=["no", "yes"]) == (
        answers[4].text
    )


@both_llms
def test_what_choices_share_is_in_one_row(llm: str, tiny_recipe: Recipes) -> None:
    """A decoder's rows hold all questions about an image, an encoder-decoder's one question."""
    model = talkative(tiny_recipe(llm))
    examples = [
        example
        for request in REQUESTS[:4]
        for example in answered(model, request_conversation(1, request), COLORS)
    ]
    rows = choice_rows(model, examples, [len(COLORS)] * 4, choosing.ROW)
    sizes = sorted(len(tree.members) for tree in rows)
    assert sizes == ([5, 5, 10] if llm == "causal" else [5, 5, 5, 5])
    assert sorted(member for tree in rows for member in tree.members) == list(range(20))
    longest = max(len(example.input_ids) for example in examples)
    assert all(len(tree.row.input_ids) < 10 * longest for tree in rows)


@pytest.mark.parametrize(
    ("llm", "how"),
    [
        ("causal", "qformer-text"),
        ("causal", "cross_attention"),
        ("causal", "prompt"),
        ("causal", "prefix"),
        ("seq2seq", "qformer-text"),
        ("seq2seq", "prompt"),
        ("seq2seq", "prefix"),
    ],
)
def test_models_of_every_kind_choose(llm: str, how: str, tiny_recipe: Recipes) -> None:
    text = tiny_recipe(llm)
    virtual = how in ("prompt", "prefix")
    model = talkative(text if virtual else with_connector(text, how))
    if virtual:
        rules: Any = [TuneRule(match="llm.*", how=how, tokens=3), TuneRule(match="*", how="frozen")]
        apply_rules(model, rules, learning_rate=1e-3, precision=torch.float32)
    answers = model.answer_batch(REQUESTS[:3], choices=COLORS)
    for request, answer in zip(REQUESTS, answers, strict=False):
        expected = one_by_one(model, request, COLORS)
        assert list((answer.probabilities or {}).values()) == pytest.approx(expected, abs=1e-5)


def test_logits_are_computed_in_chunks(
    tiny_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = talkative(tiny_recipe("causal"))
    whole = model.answer_batch(REQUESTS, choices=COLORS)
    monkeypatch.setattr(choosing, "CHUNK_BYTES", 1)
    for one, other in zip(model.answer_batch(REQUESTS, choices=COLORS), whole, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)


def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """The lengths of input and labels of all rows of each batch that is scored from now on."""
    seen: list[list[tuple[int, int]]] = []
    scored = choosing._batch_logprobs

    def noted(model: Any, rows: Any, collated: Any) -> Any:
        seen.append([(len(row.input_ids), len(row.labels)) for row in rows])
        return scored(model, rows, collated)

    monkeypatch.setattr(choosing, "_batch_logprobs", noted)
    return seen


@both_llms
def test_batches_are_of_tokens_and_questions(
    llm: str, tiny_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many choices one question has."""
    model = talkative(tiny_recipe(llm))
    many = [f"no {number}" for number in range(40)]
    questions = [f"which {number}?" for number in range(9)]
    lists = [many, *[["a", "b"]] * 8]
    whole = model.answer_batch(questions, choices=lists, batch_size=100)
    monkeypatch.setattr(choosing, "ROW", 60)
    seen = passes(monkeypatch)
    by_three = model.answer_batch(questions, choices=lists, batch_size=3)
    # Of three questions each, one of which has several rows.
    assert len(seen) == 3 and max(map(len, seen)) > 3
    if llm == "seq2seq":
        assert max(labels for rows in seen for _, labels in rows) <= 60
    seen.clear()
    monkeypatch.setattr(choosing, "BATCH", 300)
    by_tokens = model.answer_batch(questions, choices=lists, batch_size=100)
    assert all(
        len(rows) == 1 or len(rows) * sum(map(max, zip(*rows, strict=True))) <= 300 for rows in seen
    )
    assert max(map(len, seen)) > 1
    for answer, one, other in zip(whole, by_three, by_tokens, strict=True):
        assert one.probabilities == pytest.approx(answer.probabilities, abs=1e-5)
        assert other.probabilities == pytest.approx(answer.probabilities, abs=1e-5)


def test_no_questions_have_no_answers(tiny_recipe: Recipes) -> None:
    assert talkative(tiny_recipe("causal")).answer_batch([], choices=["a", "b"]) == []


def test_a_trained_embedding_table_is_scored_too(tiny_recipe: Recipes) -> None:
    """LoRA on the table stands before the head's number of rows."""
    model = talkative(tiny_recipe("causal"))
    rules: Any = [
        TuneRule(match="llm.*", how="lora", r=2, target_modules=["embed_tokens"]),
        TuneRule(match="*", how="frozen"),
    ]
    expected = model.answer("which?", choices=["a", "b"]).probabilities
    apply_rules(model, rules, learning_rate=1e-3, precision=torch.float32)
    assert model.answer("which?", choices=["a", "b"]).probabilities == pytest.approx(expected)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([], "choices must be a list of strings"),
        ("ab", "choices must be a list of strings"),
        ([1, 2], "choices"),
        (["a"], "two or more different strings"),
        (["a", "a"], "two or more different strings"),
        (["a", " "], "list of non-empty strings"),
        ([["a", "b"]], "1 lists of choices for 2 requests"),
        ([["a", "b"], "ab"], "choices must be a list of non-empty strings"),
        (["\ud800", "b"], "a choice must be valid Unicode text, got half a surrogate pair"),
    ],
)
def test_choices_that_are_none_are_refused(
    choices: Any, message: str, tiny_recipe: Recipes
) -> None:
    model = talkative(tiny_recipe("causal"))
    with pytest.raises(ArgumentError, match=message):
        model.chat_batch(["one?", "two?"], choices=choices)


def test_settings_of_generation_have_no_effect_on_choices(tiny_recipe: Recipes) -> None:
    model = talkative(tiny_recipe("causal"))
    with pytest.raises(ArgumentError, match="temperature has no effect on choices"):
        model.chat("one?", choices=["a", "b"], temperature=1.0)
    with pytest.raises(DataError, match="tokens, more than"):
        model.chat("one?", choices=["a", "b " * 999])
