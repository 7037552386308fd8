"""Answers of models that reason: the reasoning is told from the answer, whole and in pieces."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from jinja2 import Environment

from tests.helpers.chat_samples import processor
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.chat.template import load_template
from vlm_tune.data.types import Conversation, Message
from vlm_tune.errors import ArgumentError, DataError
from vlm_tune.generation.answers import AnswerReader, Written
from vlm_tune.generation.constraints import json_constraint
from vlm_tune.generation.streaming import ShownText
from vlm_tune.model.language.decoding import Decoding

QUESTION = Message("user", ("Hot?",))
WRITTEN = "<think>\nIt is June.\n</think>\n\nYes, hot."


@pytest.fixture(name="reasoning")
def reasoning_processor() -> Processor:
    return processor("qwen3", "bytes", "causal")


def ids_of(processor: Processor, text: str, *, ended: bool = True) -> list[int]:
    ends = [processor.encoder.control("<|im_end|>")] if ended else []
    return [*processor.encoder.text(text, "text"), *ends]


def shown(reader: AnswerReader, ids: list[int]) -> list[Written]:
    """The pieces of an answer that grows token by token, and its end's."""
    text = ShownText(reader)
    pieces = [text.more(ids[:count]) for count in range(1, len(ids) + 1)]
    return [piece for piece in [*pieces, text.rest(reader.answer(ids, None))] if any(piece)]


def test_reasoning_is_told_from_the_answer(reasoning: Processor) -> None:
    reader = AnswerReader(reasoning, ())
    answer = reader.answer(ids_of(reasoning, WRITTEN), None)
    assert (answer.text, answer.reasoning) == ("Yes, hot.", "It is June.")
    assert answer.finish_reason == "stop"
    pieces = shown(reader, ids_of(reasoning, WRITTEN))
    assert "".join(piece.text for piece in pieces) == "Yes, hot."
    assert "".join(piece.reasoning for piece in pieces) == "It is June."
    assert len(pieces) > 4
    # The whole text, marks included, is what rewards of formats see.
    assert reasoning.decode(answer.ids) == WRITTEN


@pytest.mark.parametrize("enable", [True, False])
@pytest.mark.parametrize("text", ["b</think>c", "<think>a</think>b</think>c", "<think>a</think>c"])
def test_a_chat_goes_on_after_an_answer_with_odd_marks(
    reasoning: Processor, text: str, enable: bool
) -> None:
    """As chat templates do: of an earlier answer what stands behind the last mark is read."""
    question = Message("user", ("Hot?",))
    prompts = [
        reasoning.thinking(enable).prompt(Conversation("chat", (question, answer, question)))
        for answer in (Message("assistant", (text,)), Message("assistant", ("c",)))
    ]
    assert prompts[0].input_ids.tolist() == prompts[1].input_ids.tolist()


def test_line_ends_behind_reasoning_are_left_out_in_any_part(reasoning: Processor) -> None:
    answer = Message("assistant", ("<think>a</think>", "\n\nYes"))
    row = Conversation("one", (Message("user", ("Hot?",)), answer))
    assert reasoning.template.parted(row).messages[-1].parts == ("Yes",)


def test_a_conversation_without_a_question_is_one_sample(reasoning: Processor) -> None:
    row = Conversation("one", (Message("assistant", ("Yes.",)),))
    assert len(reasoning.examples(row)) == 1


def test_the_formats_file_opens_answers_as_the_model_was_trained(reasoning: Processor) -> None:
    chat: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Hot?"}],
        "add_generation_prompt": True,
    }
    row = Conversation("one", (Message("user", ("Hot?",)),))
    for enable in (True, False):
        one = reasoning.thinking(enable)
        text = Environment().from_string(str(one.template.jinja)).render(**chat)
        assert text == one.tokenizer.decode(one.prompt(row).input_ids)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", ("Yes.", None)),
        ("<think>\n\n</think>\n\nYes.", ("Yes.", None)),
        ("<think>\nIt is June", ("", "It is June")),
        ("<think>\nIt is June.\n</thi", ("", "It is June.\n</thi")),
        ("<thi", ("<thi", None)),
        ("<think>", ("", None)),
        ("2 <think> 3", ("2 <think> 3", None)),
        ("<think>a</think>b</think>c", ("b</think>c", "a")),
    ],
)
def test_unfinished_and_odd_texts_lose_nothing(
    reasoning: Processor, text: str, expected: tuple[str, str | None]
) -> None:
    reader = AnswerReader(reasoning, ())
    ids = ids_of(reasoning, text, ended=False)
    answer = reader.answer(ids, None)
    assert (answer.text, answer.reasoning) == expected
    pieces = shown(reader, ids)
    assert "".join(piece.text for piece in pieces) == expected[0]
    assert "".join(piece.reasoning for piece in pieces) == (expected[1] or "")


def opening_in_the_prompt(processor: Processor) -> Processor:
    """A processor whose prompts end inside reasoning, as those of Qwen3.5."""
    template = processor.template
    prompted = [
        piece.model_copy(update={"trained": False, "reasoned": None})
        if piece.text == "<think>\n"
        else piece
        for piece in template.assistant
        if piece.reasoned is not False
    ]
    changes = {"assistant": prompted, "switched": None}
    return replace(processor, template=template.model_copy(update=changes))


def test_a_prompt_that_opens_reasoning_is_part_of_it(reasoning: Processor) -> None:
    template = reasoning.template
    opening = opening_in_the_prompt(reasoning)
    assert opening.template.opens_reasoning and not template.opens_reasoning
    reader = AnswerReader(opening, ())
    answer = reader.answer(ids_of(opening, "It is June.\n</think>\n\nYes."), None)
    assert (answer.text, answer.reasoning) == ("Yes.", "It is June.")


def test_stop_strings_end_the_answer_and_not_its_reasoning(reasoning: Processor) -> None:
    reader = AnswerReader(reasoning, ["June", "hot"])
    ids = ids_of(reasoning, WRITTEN)
    assert not reader.holds_stop(ids_of(reasoning, WRITTEN.partition("hot")[0], ended=False))
    assert reader.holds_stop(ids)
    answer = reader.answer(ids, None)
    assert (answer.text, answer.reasoning) == ("Yes,", "It is June.")


def test_the_switch_changes_the_prompt_and_what_is_read(reasoning: Processor) -> None:
    row = Conversation("one", (QUESTION,))
    prompts = {
        enable: reasoning.thinking(enable).raw_text(
            reasoning.thinking(enable).prompt(row).input_ids.tolist()
        )
        for enable in (None, True, False)
    }
    assert prompts[None] == prompts[True]
    assert prompts[False] == f"{prompts[True]}<think>\n\n</think>\n\n"
    without = AnswerReader(reasoning.thinking(False), ())
    assert without.answer(ids_of(reasoning, WRITTEN), None).text == WRITTEN
    back = reasoning.thinking(False).thinking(True)
    assert back.template.reasoning == reasoning.template.reasoning
    plain = processor("chatml", "bytes", "causal")
    assert plain.thinking(False) is plain
    with pytest.raises(DataError, match="has no enable_thinking to set"):
        plain.thinking(True)


SCHEMA = {"type": "object", "properties": {"hot": {"type": "boolean"}}, "required": ["hot"]}


@pytest.mark.parametrize("opened", [False, True])
def test_json_follows_reasoning(reasoning: Processor, opened: bool) -> None:
    """The schema holds for what follows the closing mark, and the answer can't end before."""
    if opened:
        reasoning = opening_in_the_prompt(reasoning)
    constraint = json_constraint(reasoning, Decoding(json_schema=SCHEMA), len(reasoning.tokenizer))
    assert constraint is not None
    start = "" if opened else "<think>"
    ids: list[int] = []
    matcher = constraint.first.deep_copy()

    def allowed(text: str) -> bool:
        """Whether the first token of a text may follow; `<end>` stands for the end token."""
        token = reasoning.stop_ids[0] if text == "<end>" else ids_of(reasoning, text)[0]
        return bool(constraint.allowed(matcher, ids, len(reasoning.tokenizer))[token])

    def write(text: str) -> None:
        for token in ids_of(reasoning, text, ended=False):
            assert constraint.allowed(matcher, ids, len(reasoning.tokenizer))[token], text
            matcher.consume_token(token)
            ids.append(token)

    if not opened:
        assert not allowed("{")
    write(f"{start}\nSo {{it}} is.\n")
    assert allowed("x") and allowed("<") and not allowed("<end>")
    write("</think>")
    assert not allowed("x") and allowed("\n") and allowed("{")
    write('\n\n{"hot": tr')
    assert not allowed("x") and not allowed("<end>")
    write("ue}")
    assert allowed("<end>")
    answer = AnswerReader(reasoning, ()).answer(ids, None)
    assert (answer.text, answer.reasoning) == ('{"hot": true}', "So {it} is.")


def test_the_switch_is_a_setting() -> None:
    with pytest.raises(ArgumentError, match="must be True, False or None"):
        Decoding(enable_thinking="yes")  # pyright: ignore[reportArgumentType]


def test_rows_follow_the_format(reasoning: Processor) -> None:
    """An earlier answer with reasoning is learned in a sample of its own."""
    first = Message("assistant", ("Yes.",), reasoning="June.")
    second = Message("assistant", ("No.",), reasoning="Snow.")
    cold = Message("user", ("Cold?",))
    one, two = reasoning.examples(Conversation("row", (QUESTION, first, cold, second)))
    assert (one.id, two.id) == ("row", "row#1")
    texts = [reasoning.raw_text([*each.input_ids, each.labels[-1]]) for each in (one, two)]
    assert "<think>\nJune.\n</think>\n\nYes." in texts[0]
    assert "June." not in texts[1] and texts[1].endswith("<think>\nSnow.\n</think>\n\nNo.")
    for example, text in ((one, "June."), (two, "Snow.")):
        learned = reasoning.raw_text(example.labels[example.labels >= 0].tolist())
        assert learned.startswith(f"<think>\n{text}\n</think>")
    plain = processor("chatml", "bytes", "causal")
    with pytest.raises(DataError, match="has answers without reasoning"):
        plain.examples(Conversation("row", (QUESTION, first)))
    # Marks in the text of a format without reasoning are text.
    (literal,) = plain.examples(Conversation("row", (QUESTION, Message("assistant", (WRITTEN,)))))
    assert WRITTEN in plain.raw_text(literal.input_ids.tolist())


def test_a_format_needs_a_place_for_its_reasoning(tmp_path) -> None:
    text = load_template("qwen3").jinja
    assert text
    file = tmp_path / "odd.yaml"
    file.write_text(
        "name: odd\nlayouts: [causal]\nreasoning: {}\nuser: [{content: prompt}]\n"
        "assistant: [{content: trained}, {control: eos, trained: true}]\n"
    )
    with pytest.raises(DataError, match="need each other"):
        load_template(str(file))
