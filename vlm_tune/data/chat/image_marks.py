"""Media marks in texts: `<image>`, `<video>` and `<audio>` mark places of media."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

_MARK = re.compile(r"(?P<slashes>\\*)<(?P<kind>image|video|audio)>(?P<newline>\n?)")


def split_marks(text: str, kinds: Collection[str] = ("image",)) -> list[str]:
    r"""Splits a text at its marks, as `re.split`: texts at even indices, kinds of marks at odd.

    One newline directly after a mark is removed with it. A backslash before a mark makes it plain
    text: `\<image>` is the text `<image>`, and `\\<image>` is a backslash and then a mark;
    elsewhere a backslash is a backslash. Only marks of these `kinds` are marks.
    """
    pieces = [""]
    end = 0
    for mark in _MARK.finditer(text):
        if mark["kind"] not in kinds:
            continue
        pieces[-1] += text[end : mark.start()] + "\\" * (len(mark["slashes"]) // 2)
        end = mark.end()
        if len(mark["slashes"]) % 2:
            pieces[-1] += f"<{mark['kind']}>{mark['newline']}"
        else:
            pieces += [mark["kind"], ""]
    pieces[-1] += text[end:]
    return pieces


def joined_marks(parts: Sequence[tuple[str, str]]) -> str:
    """The text that `split_marks` splits into its parts.

    Each is `("text", TEXT)` with an escaped text, or the kind of a medium and an empty text.
    """
    joined = ""
    after_mark = False
    for kind, text in parts:
        if kind == "text":
            # A newline directly after a mark would be removed with it.
            joined += "\n" * (after_mark and text.startswith("\n")) + text
        else:
            slashes = len(joined) - len(joined.rstrip("\\"))
            joined += "\\" * slashes + f"<{kind}>"
        after_mark = kind != "text"
    return joined


def escaped_marks(text: str, kind: str = "image") -> str:
    """The text in which every mark of a kind is plain text, for `split_marks`."""
    return re.sub(rf"(\\*)<{kind}>", lambda mark: rf"{mark[1] * 2}\<{kind}>", text)
