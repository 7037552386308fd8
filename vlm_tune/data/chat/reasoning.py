"""Reasoning before an answer: how a chat format writes it, and how it is told from the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pydantic import BaseModel, ConfigDict

from vlm_tune.data.types import Conversation, Media, Message

WRITTEN = ("<think>", "</think>")
"""The marks of reasoning in the answers of rows, whatever marks a model has."""

FIELDS = ("reasoning_content", "reasoning", "thinking")
"""The fields of a message with the reasoning before its answer, by their names in common use."""


class Reasoning(BaseModel):
    """How a chat format writes the reasoning before an answer.

    Attributes:
        opening: The text that begins it, without white space around it.
        closing: The text that ends it, likewise.
        strip: Which white space at both ends is left out: all, or the ends of lines alone.
        strip_answer: Whether line ends that an answer begins with are left out.
        preserved: Whether answers before the last question keep theirs.
        empty: Whether reasoning is always empty, so that marks around a text are no reasoning.
        name: The field of a message in which the checkpoint's own template reads it.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    opening: str = WRITTEN[0]
    closing: str = WRITTEN[1]
    strip: Literal["space", "lines"] | None = None
    strip_answer: bool = False
    preserved: bool = False
    empty: bool = False
    name: str = "reasoning_content"

    def stripped(self, text: str) -> str:
        """Reasoning as the format writes it."""
        return text.strip({"space": None, "lines": "\n", None: ""}[self.strip])

    def answer_parts(self, parts: list[str | Media]) -> list[str | Media]:
        """The parts of an answer as the format writes them."""
        if self.strip_answer and parts and isinstance(parts[0], str):
            return [parts[0].lstrip("\n"), *parts[1:]]
        return parts

    def parted(self, message: Message) -> Message:
        """An answer whose text begins with its reasoning, with the reasoning apart.

        The text is that of the format's own marks or of `WRITTEN`; the opening one may be missing,
        where prompts end with it. Other messages, and texts with several marks, stay as they are.
        """
        if message.role != "assistant" or message.reasoning:
            return message
        for opening, closing in ((self.opening, self.closing), WRITTEN):
            whole = message.text
            before, mark, _ = whole.partition(closing)
            begun = before.lstrip().removeprefix(opening)
            if self.empty and begun.strip():
                continue
            if mark and whole.count(closing) == 1 and opening not in begun:
                return replace(
                    message,
                    parts=_from(message.parts, len(before) + len(mark)),
                    reasoning=begun.strip("\n") if begun.strip() else "",
                )
        return message

    def of_row(self, conversation: Conversation) -> Conversation:
        """The conversation with the reasoning of its answers apart from their texts."""
        rejected = conversation.rejected
        return replace(
            conversation,
            messages=tuple(map(self.parted, conversation.messages)),
            rejected=None if rejected is None else self.parted(rejected),
        )

    def samples(self, conversation: Conversation) -> list[Conversation]:
        """The conversations to train on in place of one.

        Where the format leaves out the reasoning of answers before the last question, an earlier
        answer with reasoning can only be learned as the last one. Each trained answer is then the
        last of a conversation of its own, after what generation would see before it.
        """
        whole = self.of_row(conversation)
        messages = whole.messages
        trained = [
            place
            for place, message in enumerate(messages)
            if message.role == "assistant" and message.trained
        ]
        questions = [place for place, message in enumerate(messages) if message.role == "user"]
        last = max(questions, default=-1)
        lost = any(messages[place].reasoning for place in trained if place < last)
        if self.preserved or not lost:
            return [whole]
        context = [replace(message, trained=False) for message in messages]
        return [replace(whole, messages=(*context[:place], messages[place])) for place in trained]

    def split(self, text: str, *, opened: bool) -> tuple[str, str | None]:
        """The reasoning and the answer in a text that a model wrote; None for no answer yet.

        Args:
            text: The text, perhaps unfinished.
            opened: Whether the prompt ended inside reasoning.
        """
        begun = text.lstrip()
        if not opened:
            if not begun.startswith(self.opening):
                unsure = self.opening.startswith(begun)
                return "", None if unsure else text
            begun = begun.removeprefix(self.opening)
        reasoning, mark, answer = begun.partition(self.closing)
        return reasoning, answer if mark else None


NO_REASONING = Reasoning(empty=True)
"""Empty marks before an answer, as rows for models that may reason and do not have them."""


SWITCH = "enable_thinking"
"""The variable of chat templates by which answers have reasoning or not."""
SET = f"{{%- set {SWITCH} = {SWITCH} | default("
"""What a template begins with whose default mode was set."""


def with_default(jinja: str, enable: bool) -> str:
    """A chat template in another mode by default; a caller's own `enable_thinking` still counts."""
    return f"{SET}{str(enable).lower()}) -%}}{jinja}"


def answer_alone(message: Message, marks: Sequence[str]) -> Message:
    """An answer in a prompt without what stands before a closing mark, as chat templates read it.

    A model may have written one in any place.
    """
    text = message.text if message.role == "assistant" else ""
    ends = [text.rfind(mark) + len(mark) for mark in marks if mark in text]
    return replace(message, parts=_from(message.parts, max(ends))) if ends else message


def _from(parts: tuple[str | Media, ...], start: int) -> tuple[str | Media, ...]:
    """The parts of a turn after `start` characters of its text, without line ends before them."""
    left: list[str | Media] = []
    begun = False
    for part in parts:
        if isinstance(part, Media):
            left.append(part)
            begun = True
            continue
        text = part[start:] if begun else part[start:].lstrip("\n")
        start = max(start - len(part), 0)
        if text:
            left.append(text)
            begun = True
    return tuple(left)
