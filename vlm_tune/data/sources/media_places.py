"""A row's images, videos and audio, and the places that its text has for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_tune.data.chat.image_marks import split_marks
from vlm_tune.data.sources.fields import is_empty
from vlm_tune.data.sources.media import MediaFinder
from vlm_tune.data.types import Media, Message
from vlm_tune.errors import DataError
from vlm_tune.quoting import name_list, quoted

Row = Mapping[str, Any]
Parts = tuple[str | Media, ...]

KINDS: tuple[str, ...] = ("image", "video", "audio")
"""Kinds of media in rows."""


class RowMedia:
    """A row's media, assigned in order by their kind to the places that the text has for them."""

    def __init__(self, row: Row, finder: MediaFinder) -> None:
        self.finder = finder
        self.items: dict[str, list[Media]] = {
            kind: [finder.item(kind, value) for value in _listed(row, kind)] for kind in KINDS
        }
        self.places = dict.fromkeys(KINDS, 0)
        self._named: dict[str, set[int]] = {kind: set() for kind in KINDS}

    @property
    def marks(self) -> list[str]:
        """The kinds whose marks are marks: images, and others where the row has some."""
        return [kind for kind in KINDS if kind == "image" or self.items[kind]]

    def take(self, kind: str) -> Parts:
        """The next media item for a place of its kind.

        Returns an empty tuple once none is left; `unplaced` reports that.
        """
        number = self.places[kind]
        self.places[kind] += 1
        return tuple(self.items[kind][number : number + 1])

    def take_numbered(self, kind: str, number: Any) -> Media:
        """The media item with a number (from 0). Raises `DataError` if there is none."""
        items = self.items[kind]
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(items):
            raise DataError(
                f"a part's `index` is {quoted(number)}, "
                f"and the row has {counted(len(items), kind)}",
                kind="image_count",
            )
        self._named[kind].add(number)
        return items[number]

    def unplaced(self, *, always: bool = False) -> Parts:
        """All items of the kinds that have no place in the text, to be put first.

        Raises `DataError` where a kind's places and items differ in number. A kind without any
        place passes, unless `always` is set.
        """
        left: list[Media] = []
        for kind, items in self.items.items():
            places = self.places[kind]
            named = self._named[kind]
            if named:
                if places:
                    raise DataError(
                        f"some {kind} parts have an `index`, and other places have none",
                        kind="image_count",
                    )
                unseen = [str(number) for number in range(len(items)) if number not in named]
                if unseen:
                    raise DataError(
                        f"{counted(len(items), kind)}, "
                        f"and no part has the `index` {name_list(unseen)}",
                        kind="image_count",
                    )
            elif places == 0 and not always:
                left += items
            elif places != len(items):
                advice = f" (\\<{kind}> is the text itself)" if places > len(items) else ""
                marks = counted(places, f"<{kind}> mark or part")
                raise DataError(
                    f"{counted(len(items), kind)} and {marks} in the questions{advice}",
                    kind="image_count",
                )
        return tuple(left)


def counted(number: int, what: str) -> str:
    """A number with its noun: `1 image`, `2 images`, `2 <image> marks or parts`."""
    return f"{number} {what}" if number == 1 else f"{number} {what.replace(' or ', 's or ')}s"


def _listed(row: Row, kind: str) -> list[Any]:
    """The values of `image` or `images` (and so of the other kinds).

    A `video` that is a list holds the frames of one video.
    """
    one = row.get(kind)
    several = row.get(f"{kind}s")
    one = None if _is_no_media(one) else one
    several = None if _is_no_media(several) else several
    if one is not None and several is not None:
        raise DataError(f"both `{kind}` and `{kind}s`", kind="field")
    if several is not None and not isinstance(several, list):
        raise DataError(f"`{kind}s` must be a list, got {quoted(several)}", kind="field")
    if one is None:
        return list(several or [])
    return list(one) if isinstance(one, list) and kind != "video" else [one]


def _is_no_media(value: Any) -> bool:
    """Whether a field holds no image: null, "", [], or Arrow's object of nulls.

    A null inside a list is a missing image instead.
    """
    if isinstance(value, Mapping):
        return all(inner is None for inner in value.values())
    return not value if isinstance(value, list | bytes) else is_empty(value)


def marked_parts(text: str, media: RowMedia) -> Parts:
    """The parts of a text, each mark replaced by the next media item of its kind.

    Marks are `<image>`, and `<video>` or `<audio>` in rows with some; see `split_marks`.
    """
    parts: list[str | Media] = []
    for place, piece in enumerate(split_marks(text, media.marks)):
        if place % 2:
            parts += media.take(piece)
        elif piece:
            parts.append(piece)
    return tuple(parts)


def with_media(messages: list[Message], media: RowMedia, *, always: bool = False) -> list[Message]:
    """The turns, with media that have no place in the text put first in the first question.

    Raises `DataError` where places and media differ in number, and where marks stand only in an
    answer: an answer has no place for an image, and the text would lose its referent.
    """
    first = media.unplaced(always=always)
    if not first:
        return messages
    for place, message in enumerate(messages, 1):
        if message.role == "assistant" and len(split_marks(message.text, media.marks)) > 1:
            raise DataError(
                f"turn {place}: a mark in an answer, and none in the questions: "
                "an answer has no images",
                kind="image_count",
            )
    place = next((place for place, message in enumerate(messages) if message.role == "user"), None)
    if place is None:
        raise DataError("images and no question", kind="turns")
    return [
        *messages[:place],
        Message("user", (*first, *messages[place].parts)),
        *messages[place + 1 :],
    ]
