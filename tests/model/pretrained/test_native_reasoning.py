"""Reasoning before answers, by the chat templates of published models."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.chat_samples import processor as plain_processor
from tests.helpers.native_families import NEWEST, shipped
from tests.helpers.native_models import native_model, native_processor
from tests.helpers.native_videos import video_recipe
from tests.helpers.tiny_models import built, parsed
from tests.model.pretrained.test_native import texts_of
from vlm_tune.config.model import NativeLlm, NativeSection
from vlm_tune.data.chat.own_template import image_text, message
from vlm_tune.data.chat.processor_jinja import processor_jinja
from vlm_tune.data.chat.template import ChatTemplate
from vlm_tune.data.types import Conversation, Message
from vlm_tune.errors import DataError, ModelError
from vlm_tune.generation.answers import AnswerReader
from vlm_tune.generation.constraints import json_constraint
from vlm_tune.generation.streaming import ShownText
from vlm_tune.model.checkpoint import load_model, save_model
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.pretrained.native import (
    load_native_processor,
    renderer,
    stop_ids,
    template_of,
)

SWITCHING = sorted(NEWEST)
THINKING = "qwen3_vl_thinking"
"""A model whose template has no switch, as Qwen3-VL-Thinking's: each answer has reasoning."""
REASON = "It is June.\n\nSo the sun is up."
TURNS = [
    Message("user", ("Hot?",)),
    Message("assistant", ("No.",), reasoning="Snow is white."),
    Message("user", ("Cold?",)),
    Message("assistant", ("Yes.",), reasoning=REASON),
]


def thinking_template() -> str:
    """The template of Qwen3-VL with the answers of Qwen3's, and reasoning in every prompt's end."""
    images = shipped("qwen3_vl")
    answers = shipped("qwen3")
    start = answers.index("{%- set ns = namespace(multi_step_tool")
    last_question = answers[start : answers.index("{%- for message in messages %}", start)]
    last_question = last_question.replace("message.content is string and not", "not")
    last_question = re.sub(r"not\(message\.content\.startswith.*?\)\)", "true", last_question)
    begin = images.index('{%- elif message.role == "assistant" %}')
    written = images[begin : images.index("{%- if message.tool_calls", begin)]
    text = (
        "{%- set content = message.content if message.content is string else "
        "message.content | selectattr('text', 'defined') | map(attribute='text') | join %}"
    )
    begin = answers.index("{%- set reasoning_content = '' %}")
    reasoned = answers[begin : answers.index("{%- if message.tool_calls", begin)]
    role = '{%- elif message.role == "assistant" %}'
    images = images.replace(written, f"{role}{text}{reasoned}")
    images = images.replace(
        "{%- for message in messages %}", f"{last_question}{{%- for message in messages %}}", 1
    )
    return images.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")


def loaded(kind: str, folder: Path, enable: bool | None) -> tuple[Any, ChatTemplate]:
    """A model's processor in a mode of reasoning, and its template."""
    base: Any = "qwen3_vl" if kind == THINKING else kind
    processor = native_processor(base)
    if kind == THINKING:
        processor.chat_template = processor.tokenizer.chat_template = thinking_template()
    processor.save_pretrained(folder)
    native_model(base).config.save_pretrained(folder)
    processor = load_native_processor(NativeSection(llm=NativeLlm(name=str(folder))), None, enable)
    return processor, template_of(processor, stop_ids(str(folder)), enable)


def as_messages(turns: list[Message]) -> list[dict[str, Any]]:
    written = [message(turn.role, *turn.parts) for turn in turns]
    for each, turn in zip(written, turns, strict=True):
        if turn.reasoning:
            each["reasoning_content"] = turn.reasoning
    return written


def mode_of(kind: str) -> bool | None:
    return None if kind == THINKING else True


@pytest.mark.parametrize("kind", [*SWITCHING, THINKING])
def test_the_reasoning_of_the_last_answer_is_written_and_learned(kind: str, tmp_path: Path) -> None:
    processor, template = loaded(kind, tmp_path, mode_of(kind))
    row = Conversation("one", tuple(TURNS))
    segments = template.segments(row)
    (end,) = template.ends
    theirs = renderer(processor)(as_messages(TURNS), False)
    assert texts_of(segments).startswith(theirs.rstrip("\n")) and REASON in theirs
    assert "Snow is white." not in theirs
    opened = texts_of(template.segments(row, prompt_only=True))
    assert opened == renderer(processor)(as_messages(TURNS[:-1]), True)
    # All that follows the prompt is learned.
    (*_, last) = template.samples(row)
    alone = template.segments(last)
    learned = "".join(str(each.payload) for each in alone if each.trained)
    assert learned == texts_of(alone).rstrip("\n").removeprefix(opened)
    assert learned.endswith(f"Yes.{end}") and REASON in learned
    # So does the template that is written in its place where the recipe has a system text.
    processor.chat_template = processor_jinja(template, None, image_text(renderer(processor)))
    assert renderer(processor)(as_messages(TURNS), False).rstrip("\n") == texts_of(segments).rstrip(
        "\n"
    )
    assert renderer(processor)(as_messages(TURNS[:-1]), True) == opened


@pytest.mark.parametrize("kind", [*SWITCHING, THINKING])
def test_each_answer_is_learned_after_what_generation_sees(kind: str, tmp_path: Path) -> None:
    processor, template = loaded(kind, tmp_path, mode_of(kind))
    first, second = template.samples(Conversation("one", tuple(TURNS)))
    for sample, turns in ((first, TURNS[:2]), (second, TURNS)):
        segments = template.segments(sample)
        opened = renderer(processor)(as_messages(turns[:-1]), True)
        assert texts_of([each for each in segments if not each.trained]).rstrip("\n") == (
            opened.rstrip("\n") if opened.endswith("\n") else opened
        )
    assert [each.trained for each in second.messages] == [False, False, False, True]
    # Earlier answers without reasoning stay in one sample.
    plain = [dataclasses.replace(turn, reasoning="") for turn in TURNS[:3]]
    assert len(template.samples(Conversation("two", (*plain, TURNS[-1])))) == 1


@pytest.mark.parametrize("kind", [*SWITCHING, THINKING])
@pytest.mark.parametrize("text", ["<think>\n{}\n</think>\n\n{}", "<think>{}</think>{}"])
def test_reasoning_in_the_text_is_that_of_the_field(kind: str, text: str, tmp_path: Path) -> None:
    _, template = loaded(kind, tmp_path, mode_of(kind))
    answer = Message("assistant", (text.format(REASON, "Yes."),))
    inline = template.segments(Conversation("one", (TURNS[2], answer)))
    assert inline == template.segments(Conversation("one", tuple(TURNS[2:])))


@pytest.mark.parametrize("kind", SWITCHING)
def test_reasoning_is_refused_where_it_is_switched_off(kind: str, tmp_path: Path) -> None:
    for enable in (None, False):
        _, template = loaded(kind, tmp_path / str(enable), enable)
        row = Conversation("one", tuple(TURNS[2:]))
        with pytest.raises(DataError, match=r"data\.enable_thinking: true"):
            template.segments(row)
        # As context it is left out, as by the template; an empty block is none.
        assert texts_of(template.segments(Conversation("two", tuple(TURNS)), prompt_only=True))
        empty = Message("assistant", ("<think>\n\n</think>\n\nYes.",))
        plain = Message("assistant", ("Yes.",))
        if template.thoughts and "</think>" in template.thoughts:
            assert template.segments(Conversation("three", (TURNS[2], empty))) == template.segments(
                Conversation("three", (TURNS[2], plain))
            )
        assert template.with_thinking(True).segments(row) == loaded(
            kind, tmp_path / f"{enable} and on", True
        )[1].segments(row)


def test_a_template_without_the_switch_has_one_mode(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no enable_thinking"):
        loaded(THINKING, tmp_path, False)
    _, template = loaded(THINKING, tmp_path / "other", None)
    assert template.opens_reasoning
    with pytest.raises(DataError, match="has no enable_thinking to set"):
        template.with_thinking(False)


@pytest.mark.parametrize("further", ["", "\n  enable_thinking: false"])
def test_another_format_may_reason_where_the_checkpoints_does_not(
    further: str, tmp_path: Path
) -> None:
    text = video_recipe(tmp_path, "qwen3_vl").replace("template: own", f"template: qwen3{further}")
    model = built(parsed(text))
    assert model.processor.template.enable_thinking is not bool(further)
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert again.processor.template.enable_thinking is not bool(further)


def test_of_several_templates_the_default_one_is_read(tmp_path: Path) -> None:
    processor = native_processor("qwen2_vl")
    text = processor.chat_template
    processor.chat_template = {"default": text, "tool_use": "tools"}
    processor.save_pretrained(tmp_path)
    native_model("qwen2_vl").config.save_pretrained(tmp_path)
    section = NativeSection(llm=NativeLlm(name=str(tmp_path)))
    assert load_native_processor(section, None).chat_template == text


@pytest.mark.parametrize(
    "text", ["First.<think>Then.</think>Yes.", "<think>a</think>b<think>c</think>d"]
)
def test_marks_in_other_places_are_refused(text: str, tmp_path: Path) -> None:
    _, template = loaded("qwen3_5", tmp_path, True)
    row = Conversation("one", (TURNS[0], Message("assistant", (text,))))
    with pytest.raises(DataError, match="in another place than once"):
        template.segments(row)


@pytest.mark.parametrize("kind", ["qwen3_5", "gemma4", "glm46v"])
def test_answers_are_read_and_follow_a_schema_behind_marks_that_are_tokens(
    kind: str, tmp_path: Path
) -> None:
    native, template = loaded(kind, tmp_path, True)
    processor = dataclasses.replace(
        plain_processor("chatml", "bytes", "causal"), tokenizer=native.tokenizer, template=template
    )
    row = Conversation("one", tuple(TURNS))
    example = processor.examples(row)[-1]
    learned = example.labels[example.labels >= 0].tolist()
    answer = AnswerReader(processor, ()).answer(learned, None)
    assert (answer.text, answer.reasoning) == ("Yes.", REASON)
    shown = ShownText(AnswerReader(processor, ()))
    pieces = [shown.more(learned[:count]) for count in range(1, len(learned) + 1)]
    pieces.append(shown.rest(answer))
    assert "".join(piece.reasoning for piece in pieces) == REASON
    assert "".join(piece.text for piece in pieces) == "Yes."
    # The end of the reasoning may be written, and what follows fits the schema.
    size = len(native.tokenizer)
    decoding = Decoding(json_schema={"enum": ["Yes.", "No."]})
    constraint = json_constraint(processor, decoding, size)
    assert constraint is not None
    quoted = dataclasses.replace(row, messages=(*row.messages[:-1], with_text(TURNS[-1], '"Yes."')))
    example = processor.examples(quoted)[-1]
    matcher = constraint.first.deep_copy()
    ids: list[int] = []
    for token in example.labels[example.labels >= 0].tolist():
        allowed = constraint.allowed(matcher, ids, size)
        assert allowed[token], native.tokenizer.decode([token])
        assert token in processor.stop_ids or not allowed[processor.stop_ids].any()
        if token not in processor.stop_ids:
            matcher.consume_token(token)
            ids.append(token)
    assert AnswerReader(processor, ()).answer(ids, None).text == '"Yes."'


def with_text(turn: Message, text: str) -> Message:
    return dataclasses.replace(turn, parts=(text,))
