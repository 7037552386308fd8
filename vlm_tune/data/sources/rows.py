"""What the sources share: reading JSON rows with their line, finding images, and the policy for bad rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_tune.data.types import ROLES, Conversation, Media, Message
from vlm_tune.errors import DataError

MARK = "<image>"
"""How LLaVA's data files write the place of an image; in any other text it is plain text."""


@dataclass
class BadRows:
    """The policy for rows that can't be used: stop at the first, or skip and count up to a cap."""

    skip: bool = False
    cap: int = 100
    found: list[DataError] = field(default_factory=list)

    def keep(self, error: DataError) -> None:
        """Counts a bad row; raises it with `on_bad_row: fail`, or when the cap is passed."""
        if not self.skip:
            raise error
        self.found.append(error)
        if len(self.found) > self.cap:
            raise DataError(f"more than {self.cap} bad rows (data.max_bad_rows); the last: {error}")


def convert(
    rows: Iterable[tuple[int, Any]],
    make: Callable[[int, dict[str, Any]], Conversation],
    source: str,
    bad: BadRows,
) -> Iterator[Conversation]:
    """Conversations of rows; a row's `DataError` is given its source and number and goes to the policy."""
    for number, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            if not isinstance(row, dict):
                raise DataError(f"a row is a JSON object, this is {type(row).__name__}")
            yield make(number, row)
        except DataError as error:
            bad.keep(DataError(error.message, source=source, row=number))


def json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(row number from 1, row) of a JSON list or a JSONL file; an unreadable line comes as a `DataError`.

    A byte-order mark is skipped, empty lines are passed over. Raises `DataError` for a file that is missing or is a
    JSON document that can't be read whole.
    """
    if not path.is_file():
        raise DataError("no such file", source=str(path))
    with path.open("rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        try:
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"not a JSON list: {error}", source=str(path)) from None
        yield from enumerate(rows, 1)
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, _json_line(line)


def _json_line(line: bytes) -> Any:
    try:
        text = line.decode("utf-8")
        if "\0" in text:
            raise ValueError("a NUL byte")
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        cut = "" if line.endswith(b"\n") else " (the file's last line, perhaps cut)"
        return DataError(f"not JSON: {error}{cut}")


class ImageFolder:
    """Finds image files under one root; nothing outside it is opened."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def find(self, name: Any) -> Media:
        """The image called `name`. Raises `DataError` if it is not a file under the root, links resolved."""
        if not isinstance(name, str) or not name:
            raise DataError(f"an image is a path relative to {self.root}, got {name!r}")
        try:
            path = (self.root / name).resolve()
            if not path.is_relative_to(self.root):
                raise DataError(f"the image {name!r} lies outside the image root {self.root}")
            if not path.is_file():
                raise DataError(f"no image {name!r} under {self.root}")
        except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL byte, links in a circle
            raise DataError(f"the image {name[:200]!r} is no path: {error}") from None
        return Media(path)


def marked_parts(text: str, media: Iterator[Media]) -> tuple[str | Media, ...]:
    """Text with `<image>` marks as parts, each mark taking the next image.

    Raises `StopIteration`-free `DataError` when there are more marks than images.
    """
    parts: list[str | Media] = []
    for index, piece in enumerate(text.split(MARK)):
        if index:
            item = next(media, None)
            if item is None:
                raise DataError("more <image> marks than images")
            parts.append(item)
            piece = piece.removeprefix("\n")
        if piece:
            parts.append(piece)
    return tuple(parts)


def checked(row_id: str, messages: list[Message], category: str = "") -> Conversation:
    """A conversation whose turns make sense.

    Raises `DataError` for unknown roles, a system turn that is not first, turns that don't alternate, an empty or
    missing answer, and an empty question without media.
    """
    turns = [message for message in messages if message.role != "system"]
    for message in messages:
        if message.role not in ROLES:
            raise DataError(f"the role {message.role!r} is none of {', '.join(ROLES)}")
        if any("\ud800" <= character <= "\udfff" for character in message.text):
            raise DataError(f"the {message.role}'s text holds half a surrogate pair, which is no character")
    if any(message.role == "system" for message in messages[1:]):
        raise DataError("a system turn that is not the first")
    if not turns:
        raise DataError("no turns")
    for number, message in enumerate(turns):
        expected = "user" if number % 2 == 0 else "assistant"
        if message.role != expected:
            raise DataError(f"turn {number + 1} is the {message.role}'s, expected the {expected}'s")
        if message.role == "assistant" and not message.text.strip():
            raise DataError(f"turn {number + 1}: an empty answer")
        if message.role == "assistant" and any(isinstance(part, Media) for part in message.parts):
            raise DataError(f"turn {number + 1}: an image in an answer")
        if message.role == "user" and not message.parts:
            raise DataError(f"turn {number + 1}: an empty question")
    if turns[-1].role != "assistant":
        raise DataError("no answer to the last question")
    return Conversation(row_id, tuple(messages), category)
