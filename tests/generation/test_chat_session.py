"""A chat of several turns: the answers are those without a cache, and only new turns are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.helpers.connector_kinds import with_connector
from tests.helpers.talkative import talkative
from tests.helpers.tiny_models import png
from vlm_tune.errors import ArgumentError, DataError
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.generation.chat_session import Chat

Recipes = Callable[..., str]
RED, BLUE = png((200, 30, 30)).source, png((30, 30, 200)).source
QUESTIONS: list[tuple[str, Any]] = [
    ("what color is it?", RED),
    ("is it red?", ()),
    ("and <image> this, compared to \\<image>?", [BLUE]),
    ("thank you", ()),
]


def assert_answers_without_cache(model: VisionLanguageModel, chat: Chat, **settings: Any) -> None:
    """Asks everything, and compares each answer with that to all turns at once."""
    texts = set()
    for prompt, images in QUESTIONS:
        answer = chat.ask(prompt, images, **settings)
        messages = chat.messages
        text = [{"type": "text", "text": answer.text}] if answer.text else []
        assert messages[-1] == {"role": "assistant", "content": text}
        options: Any = {**chat.settings, **settings}
        whole = model.answer(messages=messages[:-1], **options)
        assert (whole.text, whole.ids) == (answer.text, answer.ids)
        texts.add(answer.text)
    assert len(texts) > 1


@pytest.mark.parametrize("system", [None, "be brief"])
@pytest.mark.parametrize("llm", ["causal", "seq2seq"])
def test_answers_are_those_to_all_turns(llm: str, system: str | None, tiny_recipe: Recipes) -> None:
    model = talkative(tiny_recipe(llm), data__max_length=256)
    chat = model.start_chat(system, max_new_tokens=6)
    assert_answers_without_cache(model, chat)
    chat.reset()
    assert not chat.turns
    assert_answers_without_cache(model, chat, temperature=1.1, seed=2)


@pytest.mark.parametrize("kind", ["cross_attention", "qformer-text", "fusion-gate", "resampler"])
def test_answers_of_every_connector_are_those_to_all_turns(kind: str, tiny_recipe: Recipes) -> None:
    model = talkative(with_connector(tiny_recipe("causal"), kind))
    assert_answers_without_cache(model, model.start_chat(max_new_tokens=4))


def test_only_what_is_new_is_read(tiny_recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    model = talkative(tiny_recipe("causal"))
    read: list[int] = []
    images: list[int] = []
    body, tower = model.llm.body.forward, model.tower.forward

    def noted(*args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> Any:
        read.append(inputs_embeds.shape[1])
        return body(*args, inputs_embeds=inputs_embeds, **kwargs)

    def seen(pixels: torch.Tensor) -> torch.Tensor:
        images.append(len(pixels))
        return tower(pixels)

    monkeypatch.setattr(model.llm.body, "forward", noted)
    monkeypatch.setattr(model.tower, "forward", seen)
    chat = model.start_chat(max_new_tokens=1)
    lengths = []
    for prompt, pictures in QUESTIONS:
        chat.ask(prompt, pictures)
        (whole,) = model.processor.prompts([_conversation(chat)])
        lengths.append(len(whole.input_ids))
    # Read are the tokens since the end of the last prompt, whose answer was not fed back.
    assert read[0] == lengths[0] and images == [1, 1]
    assert all(
        new <= length - before + 1
        for new, length, before in zip(read[1:], lengths[1:], lengths, strict=False)
    )


def _conversation(chat: Chat) -> Any:
    from vlm_tune.generation.requests import request_conversation

    return request_conversation(1, {"messages": chat.messages[:-1]})


def test_a_chat_goes_on_after_an_answer_that_was_broken_off(tiny_recipe: Recipes) -> None:
    model = talkative(tiny_recipe("causal"))
    chat = model.start_chat(max_new_tokens=30)
    stream: Any = chat.stream("what color is it?", RED)
    piece = next(stream)
    stream.close()
    assert [turn.text for turn in chat.turns] == ["what color is it?", piece]
    after = chat.ask("and now?", max_new_tokens=5)
    messages = chat.messages[:-1]
    assert model.answer(messages=messages, max_new_tokens=5).ids == after.ids


def test_marks_in_answers_are_text(tiny_recipe: Recipes) -> None:
    chat = talkative(tiny_recipe("causal")).start_chat()
    chat.ask("which, \\<image>?", choices=["<image>", "\\<image>"])
    question, answer = chat.messages
    assert question["content"][0]["text"] == "which, \\<image>?"
    # Where an answer is read, its marks are text as they are.
    assert answer["content"][0]["text"] == chat.turns[-1].text
    assert _conversation_of(chat.messages).messages[1].text == chat.turns[-1].text


def _conversation_of(messages: Any) -> Any:
    from vlm_tune.generation.requests import request_conversation

    return request_conversation(1, {"messages": [*messages, {"role": "user", "content": "so?"}]})


def test_a_question_that_fails_leaves_the_chat_as_it_was(tiny_recipe: Recipes) -> None:
    model = talkative(tiny_recipe("causal"))
    chat = model.start_chat(max_new_tokens=3)
    chat.ask("what color is it?", RED)
    turns = list(chat.turns)
    faults: list[tuple[Any, ...]] = [("<image> and <image>?", RED), ("hello", b"no image")]
    faults += [("long " * 999, ()), ("nowhere", "nope.png")]
    for fault in faults:
        with pytest.raises(DataError):
            chat.ask(*fault)
        assert chat.turns == turns
    with pytest.raises(ArgumentError, match="a chat's question must be a string"):
        chat.ask(["hello"])  # type: ignore[arg-type]
    for system, must in ((3, "a string"), ("\ud800", "valid Unicode")):
        with pytest.raises(ArgumentError, match=f"the system text must be {must}"):
            model.start_chat(system)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match=f"the system text must be {must}"):
            chat.system = system  # type: ignore[assignment]
    with pytest.raises(ArgumentError, match="temperature has no effect on choices"):
        chat.ask("which?", choices=["a", "b"], temperature=1.0)
    with pytest.raises(ArgumentError, match="half a surrogate pair"):
        chat.ask("which?", choices=["\ud800", "b"])
    assert chat.turns == turns and chat.system is None
    with pytest.raises(ArgumentError, match="one answer a turn"):
        model.start_chat(temperature=1.0, num_return_sequences=2)
    messages = [*chat.messages, {"role": "user", "content": "more?"}]
    answer = chat.ask("more?")
    assert answer.ids == model.answer(messages=messages, max_new_tokens=3).ids
