"""Common parts of sources: chunks, readers, containers of rows, and checks of conversations."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vlm_tune.data.sources.legible import SURROGATE, is_legible
from vlm_tune.data.types import ROLES, Conversation, Media, Message
from vlm_tune.errors import DataError
from vlm_tune.quoting import quoted, reason_of

CHUNK_ROWS = 2000
"""Approximate rows per chunk: enough to hide a worker's start, few enough to balance workers."""


@dataclass(frozen=True)
class Chunk:
    """A contiguous range of a source that one worker reads.

    It is small and picklable: it holds a byte range rather than the bytes. `number` counts chunks
    from 0. Rows are numbered from `first_row`; numbers start at 1, and again at 1 in each file of
    several. The chunk has at most `rows` rows (`sys.maxsize` for a streamed data set, whose length
    is unknown).
    """

    number: int
    first_row: int
    rows: int
    payload: Any = None


class SourceReader(Protocol):
    """An open source: picklable, read by chunks in any process, with the same rows every time."""

    name: str
    """Name in messages and reports: the path or name as the recipe gives it."""
    form: str
    """Form of a row, as detected or as configured."""

    def fingerprint(self) -> str:
        """A text that changes when the rows do, fast to compute.

        It does not cover the images, which are checked one by one.
        """
        ...

    def chunks(self) -> Iterator[Chunk]:
        """The chunks in order, in bounded memory.

        Raises `DataError` for a source that can't be read at all.
        """
        ...

    def conversations(self, chunk: Chunk) -> Iterator[Conversation | DataError]:
        """The chunk's rows in order.

        Each is a conversation with `source`, `row` and `id` set, or a `DataError` that names its
        source and row.
        """
        ...


@dataclass(frozen=True)
class StoredRow:
    """A row as stored in its container.

    It has its source and number, the `label` that its id begins with, and in `value` its fields or
    the `DataError` that replaces them.
    """

    source: str
    label: str
    number: int
    value: Any
    folder: Path | None = None
    """Root of its image paths if the recipe sets none."""
    untyped: bool = False
    """Every field is text, as in CSV: a missing value is recognized by its text."""


class Container(Protocol):
    """Uninterpreted rows in files or a data set; picklable, read by chunks in any process."""

    @property
    def name(self) -> str:
        """Its name in messages."""
        ...

    def fingerprint(self) -> str:
        """A text that changes when the stored rows do."""
        ...

    def chunks(self) -> Iterator[Chunk]:
        """The chunks in order, in bounded memory."""
        ...

    def rows(self, chunk: Chunk) -> Iterator[StoredRow]:
        """The chunk's rows in order."""
        ...


def digest(*parts: object) -> str:
    """A short hash of the parts' texts."""
    return hashlib.blake2b(
        "\0".join(map(str, parts)).encode("utf-8", "surrogatepass"), digest_size=16
    ).hexdigest()


def files_digest(files: Iterable[Path]) -> str:
    """A hash of the files' paths, sizes and modification times.

    Raises `DataError` for a file that is gone.
    """
    try:
        stats = [(path.resolve(), path.stat()) for path in files]
    except OSError as error:
        raise DataError(f"can't be read: {reason_of(error)}") from None
    return digest(*(f"{path}|{stat.st_size}|{stat.st_mtime_ns}" for path, stat in stats))


def checked(messages: Iterable[Message]) -> tuple[Message, ...]:
    """The turns as a tuple, after validation.

    Raises `DataError` for unknown roles, a system turn that is not first, turns that don't
    alternate, an answer without a visible character, and a question with neither a visible
    character nor media.
    """
    messages = tuple(messages)
    turns = [message for message in messages if message.role != "system"]
    for message in messages:
        if message.role not in ROLES:
            raise DataError(
                f"the role {quoted(message.role)} is not one of {', '.join(ROLES)}", kind="role"
            )
        if SURROGATE.search(message.reasoning + message.text):
            raise DataError(
                f"the {message.role}'s text contains half of a surrogate pair, which is not a "
                "character",
                kind="text",
            )
    if any(message.role == "system" for message in messages[1:]):
        raise DataError("a system turn that is not the first", kind="turns")
    if not turns:
        raise DataError("no turns", kind="turns")
    for number, message in enumerate(turns):
        expected = "user" if number % 2 == 0 else "assistant"
        if message.role != expected:
            raise DataError(
                f"turn {number + 1} is the {message.role}'s, expected the {expected}'s",
                kind="turns",
            )
        if message.role == "assistant" and not is_legible(message.text):
            unseen = f", nothing but {quoted(message.text)}" if message.text else ""
            raise DataError(f"turn {number + 1}: an empty answer{unseen}", kind="empty_answer")
        if message.role == "assistant" and any(isinstance(part, Media) for part in message.parts):
            raise DataError(f"turn {number + 1}: an image in an answer", kind="image_count")
        if (
            message.role == "user"
            and not is_legible(message.text)
            and not any(isinstance(part, Media) for part in message.parts)
        ):
            raise DataError(f"turn {number + 1}: an empty question", kind="empty_question")
    if turns[-1].role != "assistant":
        raise DataError("no answer to the last question", kind="turns")
    return messages
