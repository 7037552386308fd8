"""Chat formats: conversion of conversations to segments, each marked as trained or not."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlm_tune.config.yaml_source import read_yaml
from vlm_tune.data.chat.reasoning import NO_REASONING, SWITCH, Reasoning, answer_alone, with_default
from vlm_tune.data.chat.segments import joined_texts
from vlm_tune.data.types import ROLES, Conversation, Media, Message, Segment
from vlm_tune.errors import DataError, RecipeError
from vlm_tune.quoting import quoted
from vlm_tune.resources import find_resource, resource_names

PARTS_OF_TURN = ("images", "words")
"""The contents of pieces that are not the whole of a turn's."""


class Piece(BaseModel):
    """One piece of a turn: literal text, a control token by its text, or the turn's content.

    Of the content it may be the `images` alone, or the `words` alone.
    One that stands `before` text is left out of a turn whose content begins with an image, one
    with `unless` of a turn right after one of that role, and one with `when` of answers before the
    last question, or of those after it. With `reasoned` it is part of answers with reasoning alone,
    or of those without. A text with `end` ends an answer, as a control token does: it is one token
    of the model's tokenizer, and answers have it nowhere else.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    text: str | None = None
    control: str | None = None
    content: Literal["trained", "prompt", "images", "words", "reasoning"] | None = None
    trained: bool = False
    before: Literal["text"] | None = None
    unless: Literal["system", "assistant"] | None = None
    when: Literal["earlier", "last"] | None = None
    reasoned: bool | None = None
    end: bool = False


class ChatTemplate(BaseModel):
    """A chat format of `data_templates/chat`.

    Each role is a list of pieces. `start` opens every conversation, and `without_system` follows in
    one without system text. Such a conversation gets `default_system` if there is one. The control
    names `bos` and `eos` stand for the tokenizer's own tokens. `strip` removes white space at both
    ends of a turn; with `texts` at both ends of each text between its images, and none in a
    system's turn; with `answers` in answers alone. `after_image` follows each image, unless the
    text after it begins so. `between_words` stands between the texts of a turn whose `words` are
    apart from its images. With `one_question` a conversation is one question and its answer, and
    its BOS token may stand in the question's turn. `reasoning` says how the format marks what
    stands before answers; one without it has answers alone. An answer with one of `thoughts`, the
    ends of reasoning, is refused.

    `enable_thinking` is the value of the checkpoint's own switch of that name with which this is
    its template, None for its default, in which answers have no reasoning. `switched` is the format
    with the other value, None without a switch.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str
    layouts: Annotated[list[Literal["causal", "seq2seq"]], Field(min_length=1)]
    start: list[Piece] = []
    without_system: list[Piece] = []
    system: list[Piece] = []
    user: list[Piece]
    assistant: list[Piece]
    default_system: str | None = None
    strip: bool | Literal["texts", "answers"] = False
    after_image: str = ""
    between_words: str = ""
    one_question: bool = False
    reasoning: Reasoning | None = None
    thoughts: list[str] = []
    enable_thinking: bool | None = None
    switched: ChatTemplate | None = None
    jinja: str = ""

    @property
    def control_tokens(self) -> list[str]:
        """Control tokens by their text, without `bos` and `eos`."""
        roles = ("start", "without_system", "system", "user", "assistant")
        pieces: list[Piece] = [piece for role in roles for piece in getattr(self, role)]
        return list(
            dict.fromkeys(
                p.control for p in pieces if p.control and p.control not in ("bos", "eos")
            )
        )

    def segments(
        self, conversation: Conversation, *, prompt_only: bool = False, system: str | None = None
    ) -> list[Segment]:
        """The conversation's segments in order; adjacent texts, both trained or not, are joined.

        Args:
            conversation: The conversation to convert.
            prompt_only: Leaves out the last answer and opens the assistant's turn, up to its
                trained content, for the model to answer; nothing is trained.
            system: System text for a conversation without one, in place of `default_system`.

        Raises:
            DataError: The format cannot represent the conversation.
        """
        messages = list(self.parted(conversation).messages)
        if prompt_only and messages and messages[-1].role == "assistant":
            messages.pop()
        system = self.default_system if system is None else system
        if system and messages and messages[0].role != "system":
            messages.insert(0, Message("system", (system,)))
        marks = [*self.thoughts, *([self.reasoning.closing] if self.reasoning else [])]
        if prompt_only:
            messages = [answer_alone(message, marks) for message in messages]
        opening = list(self.start)
        if not messages or messages[0].role != "system":
            opening += self.without_system
        segments = [segment for piece in opening for segment in self._piece(piece, None)]
        self._check_questions(messages, conversation)
        questions = [place for place, message in enumerate(messages) if message.role == "user"]
        before: Message | None = None
        for place, message in enumerate(messages):
            self._check_role(message, conversation)
            self._check_thoughts(message, conversation, marks, context=prompt_only)
            pieces: list[Piece] = getattr(self, message.role)
            role_before = None if before is None else before.role
            other_place = "earlier" if not questions or place > questions[-1] else "last"
            segments += [
                segment
                for piece in pieces
                if piece.when != other_place
                and not (piece.unless and piece.unless == role_before)
                and piece.reasoned in (None, bool(message.reasoning))
                for segment in self._piece(piece, message, earlier=other_place == "last")
            ]
            before = message
        if prompt_only:
            for piece in self.opened:
                segments += self._piece(piece, None)
        # Earlier answers in a prompt are context and not trained.
        return [
            replace(segment, trained=False) if prompt_only else segment
            for segment in joined_texts(segments)
        ]

    @property
    def opened(self) -> list[Piece]:
        """The pieces that open an answer which the model is to write."""
        pieces = [piece for piece in self.assistant if piece.when != "earlier"]
        return list(takewhile(lambda piece: not (piece.content or piece.trained), pieces))

    @property
    def ends(self) -> list[str]:
        """The control tokens that end an answer."""
        written = dropwhile(lambda piece: piece.content in (None, "reasoning"), self.assistant)
        return [piece.control for piece in written if piece.control and piece.trained]

    @property
    def end_texts(self) -> list[str]:
        """The texts that end an answer, each of one token."""
        return [piece.text for piece in self.assistant if piece.end and piece.text]

    def parted(self, conversation: Conversation) -> Conversation:
        """The conversation with the reasoning of its answers apart, if the format has reasoning.

        A row may have it in the texts of answers, between marks (`Reasoning.parted`). A format
        without reasoning that takes answers apart leaves out empty marks alone.
        """
        if self.reasoning is None and not self.thoughts:
            return conversation
        return (self.reasoning or NO_REASONING).of_row(conversation)

    def samples(self, conversation: Conversation) -> list[Conversation]:
        """The conversations to train on in place of one: see `Reasoning.samples`."""
        return [conversation] if self.reasoning is None else self.reasoning.samples(conversation)

    def with_thinking(self, enable: bool | None) -> ChatTemplate:
        """The format for a value of `enable_thinking`; None is its default.

        Raises `DataError` if the format has no such switch.
        """
        without = self.enable_thinking is None and self.reasoning is None
        if enable is None or enable == self.enable_thinking or (without and not enable):
            return self
        if self.switched is None:
            raise DataError(
                f"the {self.name} format has no enable_thinking to set: leave it out, or name "
                "another chat format in data.template",
                source="data.enable_thinking",
            )
        back = self.model_copy(update={"switched": None})
        return self.switched.model_copy(update={"switched": back})

    @property
    def opens_reasoning(self) -> bool:
        """Whether prompts end inside reasoning, which the model then ends."""
        opened = "".join(piece.control or piece.text or "" for piece in self.opened)
        marks = self.reasoning
        return marks is not None and opened.rfind(marks.opening) > opened.rfind(marks.closing)

    def _check_role(self, message: Message, conversation: Conversation) -> None:
        if message.role not in ROLES:
            raise DataError(
                f"the role {quoted(message.role)} is not one of {', '.join(ROLES)}",
                source="conversation",
                row=conversation.id,
                kind="role",
            )
        if message.role == "system" and not self.system:
            raise DataError(
                f"the {self.name} format has no system turn",
                source="conversation",
                row=conversation.id,
                kind="template",
            )

    def _check_thoughts(
        self, message: Message, conversation: Conversation, marks: list[str], *, context: bool
    ) -> None:
        """Raises `DataError` for an answer with reasoning that the format would take apart.

        Or with reasoning that it has no place for, unless the answer is only `context`.
        """
        if message.role != "assistant":
            return
        mark = next((mark for mark in marks if mark in message.reasoning + message.text), None)
        unplaced = bool(message.reasoning) and self.reasoning is None and not context
        if mark is None and not unplaced:
            return
        fault = "an answer has reasoning" if mark is None else f"an answer contains {quoted(mark)}"
        if self.reasoning is not None:
            fault = f"{fault} in another place than once, after reasoning that it begins with"
            advice = "in data with reasoning it ends that alone: correct the row"
        elif self.switched is not None and self.switched.reasoning is not None:
            fault = f"{fault}, and answers are without reasoning"
            advice = "set data.enable_thinking: true, or remove the reasoning"
        else:
            fault = f"{fault}, and the {self.name} format has answers without reasoning"
            advice = "remove the reasoning, or name a chat format that supports it in data.template"
        raise DataError(
            f"{fault}: {advice}", source="conversation", row=conversation.id, kind="template"
        )

    def check_ends(self, conversation: Conversation) -> None:
        """Raises `DataError` for an answer to train on that contains a text by which answers end.

        Generation would stop there, and never write what follows.
        """
        for message in conversation.messages:
            trained = message.trained and message.role == "assistant"
            answer = message.text.strip() if trained else ""
            end = next((end for end in self.end_texts if end in answer), None)
            if end is not None:
                raise DataError(
                    f"an answer contains {quoted(end)}, which ends answers in the {self.name} "
                    "format: shorten it, or name another chat format in data.template",
                    row=conversation.id,
                    kind="template",
                )

    def _check_questions(self, messages: Iterable[Message], conversation: Conversation) -> None:
        roles = [message.role for message in messages]
        if self.one_question and roles.count("user") != 1:
            raise DataError(
                f"the {self.name} format has one question and its answer, not the turns "
                f"{', '.join(roles)}",
                source="conversation",
                row=conversation.id,
                kind="template",
            )

    def _piece(
        self, piece: Piece, message: Message | None, *, earlier: bool = False
    ) -> list[Segment]:
        learned = message is None or message.trained
        if piece.before and message and message.parts and isinstance(message.parts[0], Media):
            return []
        if piece.control is not None:
            return [Segment("control", piece.control, piece.trained and learned)]
        if piece.text is not None:
            return [Segment("text", piece.text, piece.trained and learned)]
        assert message is not None
        trained = piece.content in ("trained", "reasoning") and learned
        if piece.content == "reasoning":
            assert self.reasoning is not None
            return [Segment("text", self.reasoning.stripped(message.reasoning), trained)]
        parts = self._images_ended(message.parts)
        if piece.content in PARTS_OF_TURN:
            parts = self._part_of_turn(parts, piece.content)
        if self.strip == "texts":
            parts = parts if message.role == "system" else [_stripped([part])[0] for part in parts]
        elif self.strip is True or (self.strip == "answers" and message.role == "assistant"):
            parts = _stripped(parts)
        if self.reasoning is not None and message.role == "assistant" and not earlier:
            parts = self.reasoning.answer_parts(parts)
        return [
            Segment("media", part, False)
            if isinstance(part, Media)
            else Segment("text", part, trained)
            for part in parts
            if part != ""
        ]

    def _part_of_turn(self, parts: Sequence[str | Media], content: str) -> list[str | Media]:
        """A turn's images, or its words as one text."""
        if content == "images":
            return [part for part in parts if isinstance(part, Media)]
        texts = (part for part in parts if isinstance(part, str) and part)
        return [self.between_words.join(texts)]

    def _images_ended(self, parts: Sequence[str | Media]) -> list[str | Media]:
        """A turn's parts with `after_image` behind each image whose next text lacks it."""
        ended: list[str | Media] = []
        for place, part in enumerate(parts, 1):
            following = parts[place] if place < len(parts) else ""
            ended.append(part)
            begins = isinstance(following, str) and following.startswith(self.after_image)
            if isinstance(part, Media) and not begins:
                ended.append(self.after_image)
        return ended


def _stripped(parts: list[str | Media]) -> list[str | Media]:
    """Removes white space at both ends of a turn, as chat templates that trim do."""
    if parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return parts


def load_template(name: str) -> ChatTemplate:
    """Loads a shipped chat format by name, or one from a YAML file.

    Raises `DataError` for an unknown name, a malformed file, a format whose assistant turn trains
    nothing or never ends, and one that repeats the start token or has it in a turn.
    """
    path = find_resource("data_templates/chat", name)
    if path is None:
        raise DataError(
            f"no chat format {quoted(name)}; expected one of "
            f"{', '.join(resource_names('data_templates/chat'))}",
            source="data.template",
        )
    stat = path.stat()
    return _loaded_template(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=64)
def _loaded_template(path: Path, changed: int, size: int) -> ChatTemplate:
    """The format in a file that was changed at a time; a run reads its own several times."""
    return read_template(path)


def read_template(path: Path) -> ChatTemplate:
    """Loads a chat format from a YAML file; raises as `load_template`."""
    try:
        template = ChatTemplate.model_validate(read_yaml(path).value)
    except RecipeError as error:
        raise DataError(str(error), source="template") from None
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise DataError(faults, source=str(path)) from None
    for role in ("start", "without_system", "system", "user", "assistant"):
        for piece in getattr(template, role):
            if sum(value is not None for value in (piece.text, piece.control, piece.content)) != 1:
                raise DataError(
                    f"each piece of {role} is one of text, control, content", source=str(path)
                )
            if (piece.content == "trained" or piece.trained) and role != "assistant":
                raise DataError(
                    f"{role} has a trained piece; only the assistant's words are trained",
                    source=str(path),
                )
            if piece.end and not (piece.text and piece.trained):
                raise DataError(
                    f"{role} has a piece with `end` that is no trained text", source=str(path)
                )
    _check_reasoning(template, path)
    if not any(piece.content == "trained" for piece in template.assistant):
        raise DataError(
            "the assistant turn has no `content: trained`, so nothing would train", source=str(path)
        )
    if not any((piece.control or piece.end) and piece.trained for piece in template.assistant):
        raise DataError(
            "the assistant turn has no trained end token, so answers would never end",
            source=str(path),
        )
    if not any(piece.content for piece in template.user):
        raise DataError("the user turn has no content", source=str(path))
    bos = [
        piece
        for role in ("system", "user", "assistant")
        for piece in getattr(template, role)
        if piece.control == "bos"
    ]
    starts = sum(piece.control == "bos" for piece in template.start)
    if (bos and not template.one_question) or starts + len(bos) > 1:
        raise DataError(
            "the start token occurs in a turn or twice: a conversation would begin more than once",
            source=str(path),
        )
    empty = [piece for piece in template.assistant if piece.reasoned is False]
    if template.reasoning is None or not empty:
        return template
    without = _without_reasoning(template, template.reasoning)
    return template.model_copy(update={"enable_thinking": True, "switched": without})


def _check_reasoning(template: ChatTemplate, path: Path) -> None:
    """Raises `DataError` unless a format with `reasoning` has a place for it, before the answer."""
    contents = [piece.content for piece in template.assistant if piece.content]
    others = [piece.content for piece in (*template.start, *template.system, *template.user)]
    expected = ["trained"] if template.reasoning is None else ["reasoning", "trained"]
    concerned = template.reasoning is not None or "reasoning" in [*contents, *others]
    if concerned and (contents != expected or "reasoning" in others):
        raise DataError(
            "`reasoning`, and `content: reasoning` once before `content: trained` in the "
            "assistant turn, need each other",
            source=str(path),
        )


def _without_reasoning(template: ChatTemplate, reasoning: Reasoning) -> ChatTemplate:
    """A format whose prompts end with what stands before answers without reasoning."""
    assistant = [
        piece.model_copy(update={"reasoned": None, "trained": piece.trained and not fixed})
        for piece in template.assistant
        if piece.reasoned is not True
        for fixed in [piece.reasoned is False]
    ]
    changes = {"assistant": assistant, "reasoning": None, "thoughts": [reasoning.closing]}
    if template.jinja and SWITCH in template.jinja:
        changes["jinja"] = with_default(template.jinja, enable=False)
    return template.model_copy(update=changes | {"enable_thinking": False})
