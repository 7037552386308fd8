"""Formats users' values for messages and terminals: short, without control characters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

QUOTED = 200
"""Characters of a value that a message shows."""

QUOTED_NAME = 60
"""Characters of one of several names in a message."""

LISTED = 20
"""Names that a message lists."""

REASON = 300
"""Characters of a library's error that a message shows."""


def escaped(text: str) -> str:
    r"""Returns `text` with characters that do not print escaped, as `\x1b` or `\u202e`.

    These are control and format characters and lone surrogates. A terminal would act on some of
    them, and others can't be encoded.
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode()
        for each in text
    )


def escaped_lines(text: str) -> str:
    """Returns a text for a terminal: escaped, except for its line breaks and tabs."""
    return "\n".join(
        "\t".join(escaped(part) for part in line.split("\t")) for line in text.split("\n")
    )


def json_line(value: Any) -> str:
    r"""Returns a value as one line of JSON in which only printable characters stand.

    JSON leaves `\x7f` and the control characters above it as they are, and a terminal acts on them.
    What JSON can't hold is written as text.
    """
    text = json.dumps(value, ensure_ascii=False, default=str)
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in text)


def cut(text: str, limit: int = QUOTED) -> str:
    """Returns `text` escaped; if it is longer than `limit`, its beginning and its full length."""
    if len(text) <= limit:
        return escaped(text)
    return f"{escaped(text[:limit])}... ({len(text):,} characters)"


def name_list(names: Iterable[Any], limit: int = LISTED) -> str:
    """Returns names in one line, each cut to `QUOTED_NAME` characters; of many, the first ones."""
    shown = [cut(str(name), QUOTED_NAME) for name in names]
    more = f" and {len(shown) - limit:,} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more


def reason_of(error: BaseException) -> str:
    """Returns the message of a library's error in one line, cut to `REASON` characters.

    For an error without a message it returns the error's type.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return cut("; ".join(lines), REASON) if lines else type(error).__name__


def quoted(value: Any, limit: int = QUOTED) -> str:
    """Returns a short form of any value for a message.

    Text is quoted, numbers are as they are, and containers are described by their size or keys.
    """
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        if len(value) <= limit:
            return f"'{escaped(value)}'"
        return f"'{escaped(value[:limit])}'... ({len(value):,} characters)"
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length():,} bits"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, bytes | bytearray):
        return f"{len(value):,} bytes"
    if isinstance(value, Mapping):
        keys = ", ".join(escaped(str(key)) for key in list(value)[:8])
        return cut(f"a mapping with {keys}" if keys else "an empty mapping", limit)
    if isinstance(value, Sequence):
        return f"a list of {len(value):,}" if len(value) else "an empty list"
    return f"a {type(value).__name__}"


def applying(*texts: tuple[object, str]) -> list[str]:
    """The texts of those (condition, text) pairs whose condition is true."""
    return [text for applies, text in texts if applies]
