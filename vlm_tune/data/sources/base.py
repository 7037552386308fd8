"""What the sources share: chunks, readers, containers of rows, the checks every conversation passes."""

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
"""About how many rows a chunk has: enough that a worker's start does not count, few enough to share out."""


@dataclass(frozen=True)
class Chunk:
    """A stretch of a source that one worker reads: small and picklable, a byte range rather than the bytes.

    `number` counts chunks from 0; its rows are numbered from `first_row` (from 1, anew in each file of several), at most
    `rows` of them (`sys.maxsize` in a streamed data set, which does not tell).
    """

    number: int
    first_row: int
    rows: int
    payload: Any = None


class SourceReader(Protocol):
    """A source that is open: picklable, read chunk by chunk in any process, the same rows every time."""

    name: str
    """What messages and reports call it: the path or name as the recipe gives it."""
    form: str
    """What a row looks like, as detected or told."""

    def fingerprint(self) -> str:
        """Changes when the rows do (images apart, which are checked one by one); fast."""
        ...

    def chunks(self) -> Iterator[Chunk]:
        """The chunks in order, in bounded memory. Raises `DataError` for a source that can't be read at all."""
        ...

    def conversations(self, chunk: Chunk) -> Iterator[Conversation | DataError]:
        """The chunk's rows in order: a conversation (its `source`, `row` and `id` set), or a `DataError` that names both."""
        ...


@dataclass(frozen=True)
class StoredRow:
    """A row as it is kept: where it stands, what its id begins with, its fields, or the `DataError` that took their place."""

    source: str
    label: str
    number: int
    value: Any
    folder: Path | None = None
    """Where its image paths start if the recipe does not say."""
    untyped: bool = False
    """Every field is text, as in CSV: whether it is missing must be told from its letters."""


class Container(Protocol):
    """Rows in files or a data set, whatever they mean; picklable, read chunk by chunk in any process."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    def fingerprint(self) -> str:
        """Changes when the stored rows do."""
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
    """A hash of the files' paths, sizes and times of change. Raises `DataError` for one that is gone."""
    try:
        stats = [(path.resolve(), path.stat()) for path in files]
    except OSError as error:
        raise DataError(f"can't be read: {reason_of(error)}") from None
    return digest(*(f"{path}|{stat.st_size}|{stat.st_mtime_ns}" for path, stat in stats))


def checked(messages: Iterable[Message]) -> tuple[Message, ...]:
    """The turns, if they make sense.

    Raises `DataError` for unknown roles, a system turn that is not first, turns that don't alternate, an answer without
    a character that can be seen, and such a question without media.
    """
    messages = tuple(messages)
    turns = [message for message in messages if message.role != "system"]
    for message in messages:
        if message.role not in ROLES:
            raise DataError(
                f"the role {quoted(message.role)} is none of {', '.join(ROLES)}", kind="role"
            )
        if SURROGATE.search(message.text):
            raise DataError(
                f"the {message.role}'s text holds half a surrogate pair, which is no character",
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
