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
    last question, or of those after it. A text with `end` ends an answer, as a control token does:
    it is one token of the model's tokenizer, and answers have it nowhere else.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    text: str | None = None
    control: str | None = None
    content: Literal["trained", "prompt", "images", "words"] | None = None
    trained: bool = False
    before: Literal["text"] | None = None
    unless: Literal["system", "assistant"] | None = None
    when: Literal["earlier", "last"] | None = None
    end: bool = False


class ChatTemplate(BaseModel):
    """A chat format of `data_templates/chat`.

    Each role is a list of pieces. `start` opens every conversation. A conversation without system
    text gets `default_system` if there is one. The control names `bos` and `eos` stand for the
    tokenizer's own tokens. `strip` removes white space at both ends of a turn; with `texts` at both
    ends of each text between its images, and none in a system's turn; with `answers` in answers
    alone. `after_image` follows each image, unless the text after it begins so. `between_words`
    stands between the texts of a turn whose `words` are apart from its images. With `one_question`
    a conversation is one question and its answer, and its BOS token may stand in the question's
    turn. An answer with one of `thoughts`, the ends of reasoning, is refused.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str
    layouts: Annotated[list[Literal["causal", "seq2seq"]], Field(min_length=1)]
    start: list[Piece] = []
    system: list[Piece] = []
    user: list[Piece]
    assistant: list[Piece]
    default_system: str | None = None
    strip: bool | Literal["texts", "answers"] = False
    after_image: str = ""
    between_words: str = ""
    one_question: bool = False
    thoughts: list[str] = []
    jinja: str = ""

    @property
    def control_tokens(self) -> list[str]:
        """Control tokens by their text, without `bos` and `eos`."""
        pieces = [*self.start, *self.system, *self.user, *self.assistant]
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
        messages = list(conversation.messages)
        if prompt_only and messages and messages[-1].role == "assistant":
            messages.pop()
        system = self.default_system if system is None else system
        if system and messages and messages[0].role != "system":
            messages.insert(0, Message("system", (system,)))
        segments: list[Segment] = [
            segment for piece in self.start for segment in self._piece(piece, None)
        ]
        self._check_questions(messages, conversation)
        questions = [place for place, message in enumerate(messages) if message.role == "user"]
        before: Message | None = None
        for place, message in enumerate(messages):
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
            self._check_thoughts(message, conversation)
            pieces: list[Piece] = getattr(self, message.role)
            role_before = None if before is None else before.role
            other_place = "earlier" if not questions or place > questions[-1] else "last"
            segments += [
                segment
                for piece in pieces
                if piece.when != other_place and not (piece.unless and piece.unless == role_before)
                for segment in self._piece(piece, message)
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
        written = dropwhile(lambda piece: not piece.content, self.assistant)
        return [piece.control for piece in written if piece.control and piece.trained]

    @property
    def end_texts(self) -> list[str]:
        """The texts that end an answer, each of one token."""
        return [piece.text for piece in self.assistant if piece.end and piece.text]

    def _check_thoughts(self, message: Message, conversation: Conversation) -> None:
        """Raises `DataError` for an answer with reasoning that the format would take apart."""
        mark = next((mark for mark in self.thoughts if mark in message.text), None)
        if mark is not None and message.role == "assistant":
            raise DataError(
                f"an answer contains {quoted(mark)}, and the {self.name} format has answers "
                "without reasoning: remove the reasoning, or name a chat format that supports "
                "it in data.template",
                source="conversation",
                row=conversation.id,
                kind="template",
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

    def _piece(self, piece: Piece, message: Message | None) -> list[Segment]:
        learned = message is None or message.trained
        if piece.before and message and message.parts and isinstance(message.parts[0], Media):
            return []
        if piece.control is not None:
            return [Segment("control", piece.control, piece.trained and learned)]
        if piece.text is not None:
            return [Segment("text", piece.text, piece.trained and learned)]
        assert message is not None
        trained = piece.content == "trained" and learned
        parts = self._images_ended(message.parts)
        if piece.content in PARTS_OF_TURN:
            parts = self._part_of_turn(parts, piece.content)
        if self.strip == "texts":
            parts = parts if message.role == "system" else [_stripped([part])[0] for part in parts]
        elif self.strip is True or (self.strip == "answers" and message.role == "assistant"):
            parts = _stripped(parts)
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


def joined_texts(segments: Iterable[Segment]) -> list[Segment]:
    """The segments, with adjacent texts joined that are both trained or both not."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if last and last.kind == segment.kind == "text" and last.trained == segment.trained:
            joined[-1] = replace(last, payload=str(last.payload) + str(segment.payload))
        else:
            joined.append(segment)
    return joined


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
    for role in ("start", "system", "user", "assistant"):
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
    return template
