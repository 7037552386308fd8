"""A checkpoint's own chat template, taken apart into the turns of a `ChatTemplate`.

The template is a program. It is run on conversations of marks, and what stands between the marks is
what it writes around turns. Templates that write a turn by what follows it, such as those that
leave out earlier reasoning, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_tune.config.native import OWN_TEMPLATE
from vlm_tune.data.chat.template import ChatTemplate, Piece
from vlm_tune.errors import DataError

Render = Callable[[list[dict[str, Any]], bool], str]
"""Renders messages of transformers; the second argument opens the assistant's turn."""
MARKS = ("first question", "first answer", "second question", "second answer")
SYSTEM = "system words"


def own_template(render: Render, special: Sequence[str]) -> ChatTemplate:
    """Takes a chat template apart.

    Args:
        render: runs the template.
        special: the tokenizer's special tokens, by their texts.

    Raises:
        DataError: it can't be taken apart.
    """
    turns = _turns(render)
    start, system, default = _system(render, turns)
    pieces = _Pieces(special)
    return ChatTemplate(
        name=OWN_TEMPLATE,
        layouts=["causal"],
        start=pieces.of(start),
        system=[]
        if system is None
        else [*pieces.of(system[0]), Piece(content="prompt"), *pieces.of(system[1])],
        user=[
            *pieces.of(turns.user[0]),
            Piece(content="prompt"),
            *pieces.of(turns.user[1]),
        ],
        assistant=[
            *pieces.of(turns.assistant[0]),
            Piece(content="trained"),
            *pieces.answer_end(turns.assistant[1]),
        ],
        default_system=default,
        strip=_strips(render),
    )


def message(role: str, *parts: Any) -> dict[str, Any]:
    """A message of texts and images, as transformers' processors take them."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in parts
    ]
    return {"role": role, "content": content}


def image_text(render: Render) -> str:
    """The text that a chat template writes for an image. Raises `DataError` if it is empty."""
    before, _, behind = MARKS[:3]
    text = render([message("user", before, None, behind)], False)
    between = text.partition(before)[2].partition(behind)[0]
    if not between or behind not in text:
        raise refusal("it writes nothing in an image's place")
    return between


def refusal(reason: str) -> DataError:
    """The error for a template that can't be taken apart."""
    return DataError(
        f"the checkpoint's own chat template can't be taken apart: {reason}. Name a chat format "
        "that fits the model, of data_templates/chat or a file of your own (docs/data.md)",
        source="data.template",
    )


@dataclass(frozen=True)
class _Turns:
    """The texts before and after the content of turns, and before the first question."""

    opening: str
    user: tuple[str, str]
    assistant: tuple[str, str]


def _turns(render: Render) -> _Turns:
    first, answer, second, last = MARKS
    question = message("user", first)
    messages = [question, message("assistant", answer)]
    whole = _between(
        render([*messages, message("user", second), message("assistant", last)], False), MARKS
    )
    opening, turn, back, again, end = whole
    after_question = _between(render([question], False), [first])[1]
    opened = _between(render([question], True), [first])[1]
    if turn != again or turn != opened:
        raise refusal("it opens an answer in one way when it is to be written, in another later")
    if not turn.startswith(after_question) or not back.startswith(end):
        raise refusal("it writes a turn by what follows it")
    before_question = back[len(end) :]
    if not opening.endswith(before_question):
        raise refusal("it writes the first question in another way than later ones")
    return _Turns(
        opening.removesuffix(before_question),
        (before_question, after_question),
        (turn[len(after_question) :], end),
    )


def _between(text: str, marks: Sequence[str]) -> list[str]:
    """The texts before, between and after marks. Raises `DataError` if one is missing."""
    pieces: list[str] = []
    for mark in marks:
        if mark not in text:
            raise refusal("it leaves out or changes a turn's text")
        before, _, text = text.partition(mark)
        pieces.append(before)
    return [*pieces, text]


def _system(render: Render, turns: _Turns) -> tuple[str, tuple[str, str] | None, str | None]:
    """The opening of a conversation, the texts around a system text, and the default one."""
    try:
        text = render([message("system", SYSTEM), message("user", MARKS[0])], False)
    except DataError:
        return turns.opening, None, None
    before, _, behind = text.partition(SYSTEM)
    middle = behind.partition(MARKS[0])[0]
    if not middle.endswith(turns.user[0]):
        return turns.opening, None, None
    after = middle.removesuffix(turns.user[0])
    if before.startswith(turns.opening):
        return turns.opening, (before.removeprefix(turns.opening), after), None
    if turns.opening.startswith(before) and turns.opening.endswith(after):
        default = turns.opening.removeprefix(before).removesuffix(after)
        return "", (before, after), default
    raise refusal("it opens a conversation with system text in another way than one without")


def _strips(render: Render) -> bool:
    """Whether white space at the ends of a turn is left out."""
    return f" {MARKS[0]} " not in render([message("user", f" {MARKS[0]} ")], False)


class _Pieces:
    """Cuts what a template writes into text and control tokens."""

    def __init__(self, special: Sequence[str]) -> None:
        names = sorted(special, key=len, reverse=True)
        self._special = set(special)
        self._cuts = re.compile(f"({'|'.join(map(re.escape, names))})" if names else "(?!)")

    def of(self, text: str) -> list[Piece]:
        """The pieces of a text, none of them trained."""
        return [
            Piece(control=part) if part in self._special else Piece(text=part)
            for part in self._cuts.split(text)
            if part
        ]

    def answer_end(self, text: str) -> list[Piece]:
        """The pieces after an answer, of which the end token trains."""
        pieces = self.of(text)
        if not pieces or pieces[0].control is None:
            raise refusal("no special token stands after an answer, so answers would never end")
        return [Piece(control=pieces[0].control, trained=True), *pieces[1:]]
