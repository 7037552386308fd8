"""Settings of generation: draws, penalties, stop strings, log-probabilities, several answers.

The same single and batched, for decoders and encoder-decoders, continued here or by transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.talkative import talkative
from tests.helpers.tiny_models import png
from vlm_tune.data.batching.collate import collate
from vlm_tune.errors import ArgumentError
from vlm_tune.generation import answering, streaming
from vlm_tune.generation.answers import Answer
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.generation.picking import Picker, draws
from vlm_tune.generation.requests import request_conversation
from vlm_tune.model.language.decoding import Decoding

Recipes = Callable[..., str]
both_llms = pytest.mark.parametrize("llm", ["causal", "seq2seq"])
RED, BLUE = png((200, 30, 30)).source, png((30, 30, 200)).source
REQUESTS: list[Any] = [
    {"prompt": "what color is it?", "image": RED},
    {"prompt": "is it red?", "image": RED},
    {"prompt": "is it red?", "image": BLUE},
    "hello",
]
DRAWN: dict[str, Any] = {
    "temperature": 0.9,
    "top_k": 60,
    "top_p": 0.97,
    "min_p": 0.001,
    "repetition_penalty": 1.3,
    "seed": 11,
}


@pytest.fixture
def by_transformers(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets transformers' `generate` answer everything, when called."""

    def switch() -> None:
        for module in (answering, streaming):
            monkeypatch.setattr(module, "continues", lambda model, decoding: False)

    return switch


def everything(
    model: VisionLanguageModel, requests: list[Any], **settings: Any
) -> list[list[tuple[str, str, tuple[int, ...]]]]:
    """All of the answers to each request."""
    return [
        [(each.text, each.finish_reason, each.ids) for each in (answer, *answer.alternatives)]
        for answer in model.answer_batch(requests, max_new_tokens=9, **settings)
    ]


@both_llms
@pytest.mark.parametrize("settings", [DRAWN, {**DRAWN, "num_return_sequences": 3}])
def test_draws_are_the_same_single_and_batched_here_and_in_transformers(
    llm: str, settings: dict[str, Any], tiny_recipe: Recipes, by_transformers: Callable[[], None]
) -> None:
    model = talkative(tiny_recipe(llm))
    together = everything(model, REQUESTS, **settings)
    assert together == [everything(model, [request], **settings)[0] for request in REQUESTS]
    assert len({answer for answers in together for answer in answers}) >= 4
    assert {len(answers) for answers in together} == {settings.get("num_return_sequences", 1)}
    assert together != everything(model, REQUESTS, **{**settings, "seed": 12})
    by_transformers()
    assert everything(model, REQUESTS, **settings) == together


@both_llms
def test_the_first_of_several_draws_is_the_one_draw(llm: str, tiny_recipe: Recipes) -> None:
    model = talkative(tiny_recipe(llm))
    one = everything(model, REQUESTS, **DRAWN)
    several = everything(model, REQUESTS, **DRAWN, num_return_sequences=3)
    assert [answers[0] for answers in several] == [answers[0] for answers in one]
    assert any(len(set(answers)) > 1 for answers in several)


def test_without_a_seed_draws_differ(tiny_recipe: Recipes) -> None:
    model = talkative(tiny_recipe("causal"))
    texts = {model.chat("hello", temperature=2.0, max_new_tokens=12) for _ in range(3)}
    assert len(texts) > 1


def test_tokens_are_drawn_by_their_probabilities(tiny_recipe: Recipes) -> None:
    """20,000 draws against the softmax, after the warpers of transformers."""
    llm = talkative(tiny_recipe("causal")).llm
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -4.0])
    decoding = Decoding(1, temperature=2.0, top_k=5, top_p=0.9)
    count = 20_000
    numbers = np.random.default_rng(0).random((count, 1, 1))
    picker = Picker(llm, decoding, [], numbers, torch.device("cpu"))
    tokens, _ = picker.of_logits(
        logits.expand(count, 1, -1), torch.zeros(count, 1, 0, dtype=torch.int64)
    )
    shares = torch.bincount(tokens.flatten(), minlength=6) / count
    # Of the five likeliest, the first four reach 0.9.
    expected = torch.zeros(6)
    expected[:4] = (logits[:4] / 2).softmax(0)
    assert (shares - expected).abs().max() < 0.015
    assert not shares[4:].any()


def test_an_answers_draws_depend_on_the_seed_and_its_number_alone() -> None:
    first = draws(Decoding(4, temperature=1.0, seed=5), 0)
    longer = draws(Decoding(9, temperature=1.0, seed=5), 0)
    other = draws(Decoding(4, temperature=1.0, seed=5), 1)
    assert first is not None and longer is not None and other is not None
    assert np.array_equal(first, longer[:4]) and not np.array_equal(first, other)
    assert draws(Decoding(4), 0) is None


@torch.no_grad()
def by_forward(
    model: VisionLanguageModel, request: Any, ids: tuple[int, ...]
) -> tuple[list[float], list[dict[int, float]]]:
    """Log-probabilities of an answer by one forward pass of transformers over prompt and answer.

    Also those of the three likeliest tokens in each place.
    """
    (prompt,) = model.processor.prompts([request_conversation(1, request)])
    embeds = model.embed(collate([prompt], model.processor.spec, fetch=model.processor.images))
    written = torch.tensor([ids])
    llm: Any = model.llm
    if llm.layout == "seq2seq":
        inputs = llm.shifted(written)
        logits = llm.model(inputs_embeds=embeds, decoder_input_ids=inputs).logits
    else:
        whole = torch.cat([embeds, llm.embed(written)], 1)
        logits = llm.model(inputs_embeds=whole).logits[:, embeds.shape[1] - 1 : -1]
    logprobs = logits.log_softmax(-1)[0]
    top = [
        {int(token): float(row[token]) for token in row.argsort(descending=True)[:3]}
        for row in logprobs
    ]
    return logprobs.gather(-1, written[0, :, None])[:, 0].tolist(), top


def assert_likelihoods(answer: Answer, logprobs: Any, top: Any) -> None:
    """Asserts the log-probabilities of an answer's tokens and of the likeliest ones."""
    assert answer.logprobs == pytest.approx(logprobs, abs=1e-4)
    assert answer.top_logprobs is not None
    for place, expected in zip(answer.top_logprobs, top, strict=True):
        assert place == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert list(place.values()) == sorted(place.values(), reverse=True)


@both_llms
def test_log_probabilities_are_those_of_the_model(
    llm: str, tiny_recipe: Recipes, by_transformers: Callable[[], None]
) -> None:
    """Of the tokens before any temperature and penalty, as a forward pass over them has."""
    model = talkative(tiny_recipe(llm))
    noted: dict[str, Any] = {"logprobs": True, "top_logprobs": 3, "max_new_tokens": 7}
    answers = model.answer_batch(REQUESTS, **noted, **DRAWN)
    for request, answer in zip(REQUESTS, answers, strict=True):
        assert_likelihoods(answer, *by_forward(model, request, answer.ids))
        (alone,) = model.answer_batch([request], **noted, **DRAWN)
        assert_likelihoods(alone, answer.logprobs, answer.top_logprobs)
    greedy = model.answer("hello", **noted)
    assert_likelihoods(greedy, *by_forward(model, "hello", greedy.ids))
    chat = model.start_chat(**noted)
    for question in ("hello", "and now?"):
        answer = chat.ask(question)
        (*before, _) = chat.messages
        whole = model.answer(messages=before, **noted)
        assert_likelihoods(answer, whole.logprobs, whole.top_logprobs)
    assert model.answer("hello", logprobs=True, max_new_tokens=2).top_logprobs is None
    by_transformers()
    theirs = model.answer_batch(REQUESTS, **noted, **DRAWN)
    for one, other in zip(theirs, answers, strict=True):
        assert_likelihoods(one, other.logprobs, other.top_logprobs)


@both_llms
def test_a_stop_string_ends_and_cuts_an_answer(
    llm: str, tiny_recipe: Recipes, by_transformers: Callable[[], None]
) -> None:
    model = talkative(tiny_recipe(llm))
    whole = [model.answer_batch([request], max_new_tokens=12)[0] for request in REQUESTS]
    stop = next(
        answer.text[len(answer.text) // 2 :][:2] for answer in whole if len(answer.text) > 5
    )
    for switch in (lambda: None, by_transformers):
        switch()
        answers = model.answer_batch(REQUESTS, max_new_tokens=12, stop_strings=stop)
        ended = 0
        for answer, without in zip(answers, whole, strict=True):
            assert answer.text == without.text.partition(stop)[0].strip()
            if stop in without.text:
                ended += 1
                assert answer.finish_reason == "stop" and len(answer.ids) <= len(without.ids)
                assert stop in model.processor.raw_text(answer.ids)
                assert stop not in model.processor.raw_text(answer.ids[:-1])
        assert ended


@both_llms
def test_a_penalty_leaves_repeated_tokens_out(llm: str, tiny_recipe: Recipes) -> None:
    model = talkative(tiny_recipe(llm))
    plain = model.answer_batch(REQUESTS, max_new_tokens=12)
    penalised = model.answer_batch(REQUESTS, max_new_tokens=12, repetition_penalty=50.0)
    repeats = [len(each.ids) - len(set(each.ids)) for each in plain]
    assert sum(repeats) > 0
    assert all(len(each.ids) == len(set(each.ids)) for each in penalised)
    beams = model.answer_batch(
        REQUESTS, max_new_tokens=6, num_beams=2, num_return_sequences=2, repetition_penalty=1.5
    )
    assert all(len(each.alternatives) == 1 for each in beams)
    assert any(each.text != each.alternatives[0].text for each in beams)


def test_a_prompt_without_text_has_nothing_to_penalise(tiny_recipe: Recipes) -> None:
    llm = talkative(tiny_recipe("causal")).llm
    decoding = Decoding(4, repetition_penalty=2.0)
    logits = torch.linspace(-1, 1, 12).view(2, 1, 6)
    none = torch.zeros(2, 1, 0, dtype=torch.int64)
    picker = Picker(llm, decoding, [[[]], [[3, 5]]], None, torch.device("cpu"))
    scores = picker.penalised(logits[:, 0], none[:, 0])
    expected = logits[:, 0].clone()
    expected[1, [3, 5]] /= 2
    torch.testing.assert_close(scores, expected)


@both_llms
def test_why_an_answer_ended_is_said(
    llm: str, tiny_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = talkative(tiny_recipe(llm))
    answer = model.answer("hello", max_new_tokens=2)
    assert answer.finish_reason == "length" and len(answer.ids) == 2
    stops = [*model.processor.stop_ids, answer.ids[1]]
    monkeypatch.setattr(type(model.processor), "stop_ids", stops)
    ended = model.answer("hello", max_new_tokens=9)
    assert ended.finish_reason == "stop" and ended.ids == answer.ids[:1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature must be a number from 0 to 100, got -1"),
        ({"temperature": 1e-9}, "temperature must be 0, or at least 0.0001, got 1e-09"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"temperature": True}, "temperature must be a number"),
        ({"temperature": float("nan")}, "temperature must be a number"),
        ({"temperature": 1, "top_p": -0.5}, "top_p must be a number from 0 to 1, got -0.5"),
        ({"temperature": 1, "top_p": 1.5}, "top_p must be a number from 0 to 1"),
        ({"temperature": 1, "min_p": 2}, "min_p must be a number from 0 to 1"),
        ({"temperature": 1, "top_k": -3}, "top_k must be an integer of 0 or more"),
        ({"temperature": 1, "top_k": 2.0}, "top_k must be an integer of 0 or more"),
        ({"temperature": 1, "seed": "a"}, "seed must be an integer of 0 or more"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number from 0.01 to 100"),
        ({"num_return_sequences": 0, "temperature": 1}, "num_return_sequences must be an integer"),
        ({"num_return_sequences": 2}, "num_return_sequences above 1 gives equal answers"),
        ({"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences 3 is above num_beams"),
        ({"num_beams": 2, "temperature": 1.0}, "num_beams above 1 is a search"),
        ({"num_beams": 2, "logprobs": True}, "logprobs are those of greedy search"),
        ({"logprobs": 1}, "logprobs must be True or False"),
        ({"top_logprobs": 5}, "set logprobs=True"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs must be an integer from 0 to 20"),
        ({"top_logprobs": True, "logprobs": True}, "top_logprobs must be an integer from 0 to 20"),
        ({"top_p": 0.5}, "top_p has no effect where no token is drawn"),
        ({"seed": 3}, "seed has no effect where no token is drawn"),
        ({"stop_strings": [""]}, "stop_strings must be a non-empty string or a list"),
        ({"temprature": 1}, "there is no setting 'temprature'; did you mean temperature"),
        ({"do_it": 1}, "there is no setting 'do_it'; expected one of max_new_tokens"),
        ({"stop_strings": 5}, "stop_strings must be a non-empty string or a list"),
    ],
)
def test_settings_that_are_none_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Decoding.of({"max_new_tokens": 4, **settings})
