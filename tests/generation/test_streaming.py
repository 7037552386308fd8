"""Answers in pieces: they add up to the answer, and an iterator that is closed stops the work."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.helpers.talkative import talkative
from tests.helpers.tiny_models import built, parsed, png
from vlm_tune.data.chat.tokenize import TextEncoder
from vlm_tune.errors import ArgumentError, DataError
from vlm_tune.generation import answering, streaming
from vlm_tune.generation.answers import AnswerReader
from vlm_tune.generation.logprobs import TokenLogprobs
from vlm_tune.generation.requests import request_conversation
from vlm_tune.generation.streaming import streamed_answers
from vlm_tune.model.language.decoding import Decoding

Recipes = Callable[..., str]
both_llms = pytest.mark.parametrize("llm", ["causal", "seq2seq"])
RED = png((200, 30, 30)).source
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 1.2, "seed": 4, "logprobs": True},
    "stopped": {"stop_strings": ["e", "a b"]},
    "beams": {"num_beams": 2},
}


@both_llms
@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("by", ["here", "transformers"])
def test_pieces_add_up_to_the_answer(
    llm: str, how: str, by: str, tiny_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = talkative(tiny_recipe(llm))
    if by == "transformers":
        for module in (answering, streaming):
            monkeypatch.setattr(module, "continues", lambda model, decoding: False)
    numbers = []
    for prompt, image in (("what color is it?", RED), ("hello", ())):
        settings = {"max_new_tokens": 14, **SETTINGS[how]}
        pieces = list(model.stream(prompt, image, **settings))
        assert "".join(pieces) == model.chat(prompt, image, **settings)
        assert all(pieces)
        numbers.append(len(pieces))
    # A text of single bytes that make no character comes late.
    assert numbers == [1, 1] if how == "beams" else max(numbers) > 1 or how == "stopped"


@both_llms
@pytest.mark.parametrize("how", ["joined", "parted", "rows", "transformers"])
def test_several_draws_are_written_together(
    llm: str, how: str, tiny_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = talkative(tiny_recipe(llm))
    if how == "transformers":
        for module in (answering, streaming):
            monkeypatch.setattr(module, "continues", lambda model, decoding: False)
    elif how == "rows":
        monkeypatch.setattr(answering, "_branches", lambda model, decoding: False)
    drawn: dict[str, Any] = {"temperature": 1.2, "seed": 4, "logprobs": True}
    settings = {"max_new_tokens": 14, "num_return_sequences": 3, "stop_strings": ["zq"], **drawn}
    first = model.answer("what color is it?", RED, **settings)
    request = {"prompt": "what color is it?", "images": RED}
    (prompt,) = model.processor.prompts([request_conversation(1, request)])
    if how == "parted":  # the prompt and one branch more fit into a row, and the third does not
        monkeypatch.setattr(answering, "JOINED_PROMPTS", len(prompt.input_ids) + 1)
    texts = {0: "", 1: "", 2: ""}
    steps = streamed_answers(model, prompt, Decoding(**settings), model.processor.images.inputs)
    count = 0
    with model.evaluating():
        while True:
            try:
                added = next(steps)
            except StopIteration as end:
                answers = end.value
                break
            count += 1
            for number, written in added:
                assert written.text
                texts[number] += written.text
    assert 2 <= count <= 15
    for number, expected in enumerate([first, *first.alternatives]):
        assert texts[number] == answers[number].text == expected.text
        assert answers[number].ids == expected.ids
        assert answers[number].logprobs == pytest.approx(expected.logprobs, abs=1e-4)


@pytest.mark.parametrize("by", ["here", "transformers"])
def test_a_closed_stream_stops_and_leaves_the_mode_as_it_was(
    by: str, tiny_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = talkative(tiny_recipe("causal")).train()
    if by == "transformers":
        monkeypatch.setattr(streaming, "continues", lambda model, decoding: False)
    threads = threading.active_count()
    stream: Any = model.stream("what color is it?", RED, max_new_tokens=2000)
    assert next(stream) and not model.training
    stream.close()
    assert model.training and threading.active_count() == threads


def test_a_fault_while_generating_reaches_the_reader(
    tiny_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = talkative(tiny_recipe("causal"))
    monkeypatch.setattr(streaming, "continues", lambda model, decoding: False)
    monkeypatch.setattr(type(model.llm), "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(model.stream("hello"))


def test_what_can_not_be_answered_is_refused_before_the_first_piece(tiny_recipe: Recipes) -> None:
    model = built(parsed(tiny_recipe("causal")))
    with pytest.raises(ArgumentError, match="a stream has one answer"):
        model.stream("hello", temperature=1.0, num_return_sequences=2)
    with pytest.raises(ArgumentError, match="top_p"):
        model.stream("hello", top_p=3.0, temperature=1.0)
    with pytest.raises(DataError, match="0 images and 1 <image> marks"):
        model.stream("<image>?")
    with pytest.raises(ArgumentError, match="both a prompt and messages"):
        model.stream("a", messages=[{"role": "user", "content": "b"}])


PLAIN: Any = SimpleNamespace(reasoning=None, opens_reasoning=False)
"""A chat format without reasoning."""


class _Letters:
    """A processor whose ids are characters, and `9` a byte of none."""

    stop_ids = (0,)
    template = PLAIN

    encoder = SimpleNamespace(trailing_bytes=lambda ids: b"")

    def raw_text(self, ids: Any) -> str:
        return "".join("\ufffd" if token == 9 else chr(token) for token in ids)


def test_what_later_tokens_may_change_is_held_back() -> None:
    letters: Any = _Letters()
    reader = AnswerReader(letters, ["END", "\n\n"])

    def shown(text: str) -> str:
        return reader.shown([ord(each) for each in text]).text

    assert shown(" a ") == "a"
    assert shown("a\t") == "a"
    assert shown("ab E") == "ab"
    assert shown("ab EN") == "ab"
    assert shown("ab ENT") == "ab ENT"
    assert shown("ab END") == "ab"
    assert shown("ab\n") == "ab"
    answer = reader.answer([ord(each) for each in "ab END more"], None)
    assert (answer.text, answer.finish_reason, len(answer.ids)) == ("ab", "stop", 6)
    logprobs = TokenLogprobs.of(torch.zeros(3, 4).log_softmax(-1), torch.tensor([1, 2, 3]), 2)
    answer = reader.answer([97, 0, 98], logprobs)
    assert answer.logprobs == pytest.approx([-math.log(4)])
    assert answer.top_logprobs is not None and len(answer.top_logprobs) == 1


class _Bytes:
    """A processor whose tokenizer has a token for each byte, and one for `a`."""

    stop_ids = (257,)
    template = PLAIN

    def __init__(self) -> None:
        tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), "a", "</s>"]
        ids = {token: number for number, token in enumerate(tokens)}
        backend = Tokenizer(models.BPE(ids, [], byte_fallback=True))
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
        self.encoder = TextEncoder(self.tokenizer)

    def raw_text(self, ids: Any) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


@pytest.mark.parametrize(
    ("run", "texts"),
    [
        ("é你".encode(), ["a", "a", "aé", "aé", "aé", "aé你"]),
        (b"\xc3\xa9\xff", ["a", "a", "aé", "a\ufffd\ufffd\ufffd"]),
    ],
    ids=["text", "no-text"],
)
def test_pieces_of_byte_tokens_add_up_wherever_an_answer_ends(run: bytes, texts: list[str]) -> None:
    processor: Any = _Bytes()
    reader = AnswerReader(processor, ())
    ids = [256, *run]
    for count, text in enumerate(texts, 1):
        answer = reader.answer(ids[:count], None)
        assert (answer.text, answer.ids) == (text, tuple(ids[:count]))
        written = iter([ids[:end] for end in range(1, count + 1)])
        assert "".join(streaming._pieces(written, reader)) == text
    # A run that a text token ends does not change any more.
    assert reader.shown([*ids, 256]).text == reader.answer([*ids, 256], None).text
    assert reader.answer([256, 0xC3, 257], None).text == "a\ufffd"


class _Counting:
    """A processor that counts the ids that it decodes."""

    def __init__(self, processor: Any) -> None:
        self.stop_ids = (-1,)
        self.template = PLAIN
        self.encoder = processor.encoder
        self.decode = processor.raw_text
        self.decoded = 0

    def raw_text(self, ids: Any) -> str:
        self.decoded += len(ids)
        return self.decode(ids)


@pytest.mark.parametrize("kind", ["causal", "seq2seq", "bytes"])
def test_a_growing_answer_is_not_decoded_again_and_again(kind: str, tiny_recipe: Recipes) -> None:
    processor: Any
    if kind == "bytes":
        processor = _Bytes()
        # Text, and runs of bytes that are characters or none.
        choices = [256, 256, 256, 0xC3, 0xA9, 0xFF]
    else:
        processor = built(parsed(tiny_recipe(kind))).processor
        choices = list(range(len(processor.tokenizer)))
    counting: Any = _Counting(processor)
    afresh: Any = _Counting(processor)
    reader = AnswerReader(counting, ["aaaa"])
    ids: list[int] = []
    for token in np.random.default_rng(0).choice(choices, 300).tolist():
        ids.append(token)
        other = AnswerReader(afresh, ["aaaa"])
        assert reader.shown(ids) == other.shown(ids)
        assert reader.holds_stop(ids) == other.holds_stop(ids)
    # All of them each time, twice, would be 90,300.
    assert counting.decoded < 30_000
    answer = reader.answer(ids, None)
    assert answer == AnswerReader(afresh, ["aaaa"]).answer(ids, None)
