"""A checkpoint's own chat template, taken apart into the turns of a `ChatTemplate`.

The template is a program. It is run on conversations of marks, and what stands between the marks is
what it writes around turns. An answer before the last question may open otherwise than one after
it, as where templates leave out earlier reasoning. Where the template writes reasoning before an
answer, the marks show how.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from vlm_tune.config.native import OWN_TEMPLATE
from vlm_tune.data.chat.reasoning import FIELDS, WRITTEN, Reasoning
from vlm_tune.data.chat.template import ChatTemplate, Piece
from vlm_tune.errors import DataError

Render = Callable[[list[dict[str, Any]], bool], str]
"""Renders messages of transformers; the second argument opens the assistant's turn."""
MARKS = ("first question", "first answer", "second question", "second answer")
SYSTEM = "system words"
THOUGHTS = (WRITTEN, ("<|channel>", "<channel|>"), ("[THINK]", "[/THINK]"))
"""Beginnings and ends of reasoning, by which templates take answers apart."""
REASONS = ("first reason", "second reason")


def own_template(
    render: Render,
    special: Sequence[str],
    stops: Sequence[str] = (),
    lead: str = "",
    *,
    reasons: bool = True,
) -> ChatTemplate:
    """Takes a chat template apart.

    Args:
        render: runs the template.
        special: the tokenizer's special tokens, by their texts.
        stops: the tokens at which the model's generation stops.
        lead: the special token that the processor puts before what the template writes.
        reasons: whether answers may have reasoning, if the template writes some.

    Raises:
        DataError: it can't be taken apart.
    """
    turns = _turns(render)
    reasoned = _reasoned(render, turns) if reasons else None
    start, system, default, without = _system(render, turns)
    pieces = _Pieces(special)
    user = pieces.of(turns.user[0])
    answer_end = pieces.of(turns.end)
    if not turns.end and user and user[0].control in stops:
        # The next turn's first token ends an answer.
        answer_end = [user[0]]
        user = [user[0].model_copy(update={"unless": "assistant"}), *user[1:]]
    return ChatTemplate(
        name=OWN_TEMPLATE,
        layouts=["causal"],
        start=pieces.of(lead + start),
        without_system=pieces.of(without),
        system=[]
        if system is None
        else [*pieces.of(system[0]), Piece(content="prompt"), *pieces.of(system[1])],
        user=[*user, Piece(content="prompt"), *pieces.of(turns.user[1])],
        assistant=[
            *pieces.openings(turns, reasoned),
            Piece(content="trained"),
            *_trained_end(answer_end),
        ],
        default_system=default,
        strip=_strips(render),
        reasoning=None if reasoned is None else reasoned.reasoning,
        thoughts=[mark for _, mark in THOUGHTS if not _writes(render, mark)],
    )


def message(role: str, *parts: Any) -> dict[str, Any]:
    """A message of texts, images and videos, as transformers' processors take them.

    A video is a list of its frames.
    """

    def content(part: Any) -> dict[str, Any]:
        kind = "text" if isinstance(part, str) else "video" if isinstance(part, list) else "image"
        return {"type": kind, kind: part}

    return {"role": role, "content": list(map(content, parts))}


def image_text(render: Render) -> str:
    """The text that a chat template writes for an image. Raises `DataError` if it is empty."""
    written = _written_for(render, None)
    if not written:
        raise refusal("it writes nothing for an image")
    return written


def video_text(render: Render) -> str:
    """The text that a chat template writes for a video; empty where it knows none."""
    try:
        return _written_for(render, [])
    except DataError:
        return ""


def _written_for(render: Render, part: Any) -> str:
    """The text that a template writes for a part of a turn, between two texts."""
    before, _, behind = MARKS[:3]
    text = render([message("user", before, part, behind)], False)
    between = text.partition(before)[2].partition(behind)[0]
    return between if behind in text else ""


def refusal(reason: str) -> DataError:
    """The error for a template that can't be taken apart."""
    return DataError(
        f"the checkpoint's own chat template can't be split into turns: {reason}. Name a chat "
        "format that fits the model, of data_templates/chat or a file of your own "
        "(docs/data.md)",
        source="data.template",
    )


def untrained_opening(render: Render) -> int | None:
    """How much longer a written answer's opening is than the one that a prompt ends with.

    None if the prompt's is another one. Raises `DataError` as `own_template`.
    """
    turns = _turns(render)
    if not turns.last.startswith(turns.opened):
        return None
    return len(turns.last) - len(turns.opened)


@dataclass(frozen=True)
class _Turns:
    """The texts around the content of turns.

    Attributes:
        opening: what stands before the first question.
        user: what stands before and after a question.
        earlier: what opens an answer before the last question.
        last: what opens one after it.
        opened: what opens an answer that is to be written.
        end: what stands after an answer.
    """

    opening: str
    user: tuple[str, str]
    earlier: str
    last: str
    opened: str
    end: str


def _turns(render: Render) -> _Turns:
    first, answer, second, last = MARKS
    question = message("user", first)
    messages = [question, message("assistant", answer)]
    opening, turn, back, last_turn, end = _between(
        render([*messages, message("user", second), message("assistant", last)], False), MARKS
    )
    after_question = _between(render([question], False), [first])[1]
    openings = [turn, last_turn, _between(render([question], True), [first])[1]]
    if not back.startswith(end) or any(not text.startswith(after_question) for text in openings):
        raise refusal("it renders a turn depending on what follows it")
    before_question = back[len(end) :]
    if not opening.endswith(before_question):
        raise refusal("it renders the first question differently from later ones")
    earlier, of_last, opened = (text[len(after_question) :] for text in openings)
    return _Turns(
        opening=opening.removesuffix(before_question),
        user=(before_question, after_question),
        earlier=earlier,
        last=of_last,
        opened=opened,
        end=end,
    )


@dataclass(frozen=True)
class _Reasoned:
    """The texts around the reasoning of an answer after the last question.

    Attributes:
        before: what opens the answer, up to its reasoning.
        after: what stands between reasoning and answer.
        reasoning: what is known of the reasoning.
    """

    before: str
    after: str
    reasoning: Reasoning


def _reasoned(render: Render, turns: _Turns) -> _Reasoned | None:
    """How a template writes reasoning; None if it writes none, or none after its own prompts."""
    first, answer, second, last = MARKS
    for name in FIELDS:
        messages = [message("user", first), message("assistant", answer)]
        messages += [message("user", second), message("assistant", last)]
        for place, reason in zip((1, 3), REASONS, strict=True):
            messages[place][name] = reason
        try:
            _, earlier, _, before, after, end = _between(
                render(messages, False), [first, answer, second, REASONS[1], last]
            )
            return _taken(render, turns, name, (earlier, before, after, end))
        except DataError:
            continue
    return None


def _taken(
    render: Render, turns: _Turns, name: str, texts: tuple[str, str, str, str]
) -> _Reasoned | None:
    """Reasoning by the texts before an earlier answer, around the last one's, and at its end.

    None where prompts end otherwise than answers with reasoning open, or marks are unknown.
    """
    earlier, before, after, end = texts
    question = turns.user[1]
    history = earlier.removeprefix(question)
    opening = before.removeprefix(question)
    preserved = opening + REASONS[0] + after
    marks = next((pair for pair in THOUGHTS if pair[0] in opening and pair[1] in after), None)
    if (
        marks is None
        or end != turns.end
        or not opening.startswith(turns.opened)
        or history not in (turns.earlier, preserved)
    ):
        return None

    def written(reason: str, answer: str) -> str:
        turn = message("assistant", answer) | {name: reason}
        return render([message("user", MARKS[0]), turn], False)

    reason, answer = REASONS[0], MARKS[1]
    lines = written(f"\n {reason} \n", answer)
    strip = (
        "space" if f" {reason}" not in lines else "lines" if f"\n {reason}" not in lines else None
    )
    reasoning = Reasoning(
        opening=opening[opening.rindex(marks[0]) :].strip(),
        closing=marks[1],
        strip=strip,
        strip_answer=f"{after}\n" not in written(reason, f"\n {answer}"),
        preserved=history == preserved,
        name=name,
    )
    return _Reasoned(opening, after, reasoning)


def _between(text: str, marks: Sequence[str]) -> list[str]:
    """The texts before, between and after marks. Raises `DataError` if one is missing."""
    pieces: list[str] = []
    for mark in marks:
        if mark not in text:
            raise refusal("it leaves out or changes a turn's text")
        before, _, text = text.partition(mark)
        pieces.append(before)
    return [*pieces, text]


def _system(render: Render, turns: _Turns) -> tuple[str, tuple[str, str] | None, str | None, str]:
    """The opening of a conversation, the texts around a system text, and the default one.

    The last text opens conversations without system text, after the opening.
    """
    try:
        text = render([message("system", SYSTEM), message("user", MARKS[0])], False)
    except DataError:
        return turns.opening, None, None, ""
    before, _, behind = text.partition(SYSTEM)
    middle = behind.partition(MARKS[0])[0]
    if not middle.endswith(turns.user[0]):
        return turns.opening, None, None, ""
    after = middle.removesuffix(turns.user[0])
    if before.startswith(turns.opening):
        return turns.opening, (before.removeprefix(turns.opening), after), None, ""
    if turns.opening.startswith(before) and turns.opening.endswith(after):
        default = turns.opening.removeprefix(before).removesuffix(after)
        if default:
            return "", (before, after), default, ""
    return "", (before, after), None, turns.opening


def _strips(render: Render) -> bool | Literal["texts", "answers"]:
    """Where white space is left out: at the ends of turns, of texts beside images, of answers."""
    first, answer, second, _ = MARKS
    question = render([message("user", f" {first} ", None, f" {second} ")], False)
    if f" {first} " not in question:
        return "texts" if f"{first} " not in question else True
    answered = render([message("user", first), message("assistant", f" {answer} ")], False)
    return "answers" if f" {answer} " not in answered else False


def _writes(render: Render, mark: str) -> bool:
    """Whether an answer with a mark in it is written as it is."""
    first, answer, second, _ = MARKS
    text = f"{answer}{mark}{second}"
    return text in render([message("user", first), message("assistant", text)], False)


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

    def openings(self, turns: _Turns, reasoned: _Reasoned | None) -> list[Piece]:
        """The pieces that open an answer, and its reasoning; those after the prompt's end train.

        Raises `DataError` if a prompt ends otherwise than an answer opens.
        """
        if not turns.last.startswith(turns.opened):
            raise refusal(
                "it opens an answer differently in the generation prompt and in the history"
            )
        last = self._opening(turns.last, turns.opened)
        earlier = self._opening(turns.earlier, turns.opened)
        if reasoned is not None:
            before = self._opening(reasoned.before, turns.opened)
            after = [
                piece.model_copy(update={"trained": True}) for piece in self.of(reasoned.after)
            ]
            whole = [*before, Piece(content="reasoning"), *after]
            last = _joined(last, whole, {"reasoned": False}, {"reasoned": True})
            if reasoned.reasoning.preserved:
                earlier = _joined(earlier, whole, {"reasoned": False}, {"reasoned": True})
        return _joined(earlier, last, {"when": "earlier"}, {"when": "last"})

    def _opening(self, text: str, opened: str) -> list[Piece]:
        if not text.startswith(opened):
            return self.of(text)
        written = self.of(text.removeprefix(opened))
        trained = [piece.model_copy(update={"trained": True}) for piece in written]
        return [*self.of(opened), *trained]


def _joined(
    one: list[Piece], other: list[Piece], of_one: dict[str, Any], of_other: dict[str, Any]
) -> list[Piece]:
    """Two lists of pieces as one: what they begin with together, and each rest on its condition."""
    same = (a == b for a, b in zip(one, other, strict=False))
    shared = len(list(takewhile(bool, same)))
    return [
        *one[:shared],
        *(piece.model_copy(update=of_one) for piece in one[shared:]),
        *(piece.model_copy(update=of_other) for piece in other[shared:]),
    ]


def _trained_end(pieces: list[Piece]) -> list[Piece]:
    """The pieces after an answer, of which the end token trains."""
    if not pieces or pieces[0].control is None:
        raise refusal("no special token stands after an answer, so answers would never end")
    return [Piece(control=pieces[0].control, trained=True), *pieces[1:]]
