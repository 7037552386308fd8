"""Values of users as a message or a terminal can show them: short, and without control characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

QUOTED = 200
"""Characters of a value that a message shows."""

REASON = 300
"""Characters of a library's error that a message shows."""


def escaped(text: str) -> str:
    r"""Returns `text` with every character that does not print (control, format, lone surrogate) as `\x1b` or `\u202e`.

    A terminal would act on some of these, and others can't be encoded at all.
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode()
        for each in text
    )


def cut(text: str, limit: int = QUOTED) -> str:
    """Returns `text` escaped, and where it is longer than `limit` its begin and how long the whole is."""
    if len(text) <= limit:
        return escaped(text)
    return f"{escaped(text[:limit])}... ({len(text):,} characters)"


def reason_of(error: BaseException) -> str:
    """Returns what a library's error says in one line, cut to what a message can take.

    Its type where it says nothing.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return cut("; ".join(lines), REASON) if lines else type(error).__name__


def quoted(value: Any, limit: int = QUOTED) -> str:
    """Returns a short name of any value for a message: a text in quotes, numbers as they are, containers by what they hold."""
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
