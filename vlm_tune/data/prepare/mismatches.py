"""Rows of captions that do not match, for scores of matching: each with another row's image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vlm_tune.data.types import Conversation, Media, Message


def with_mismatches(rows: Sequence[Conversation]) -> list[Conversation]:
    """The rows, each of the form `match` followed by one with another row's image.

    It is the next row of the same category and as many images and frames of videos, of which no row
    has this caption.
    Where there is none, the row has no such neighbour. Rows of other forms stay as they are.
    """
    matches = [row for row in rows if row.references.form == "match"]
    captions: dict[tuple[Media, ...], set[str]] = {}
    alike: dict[tuple[str, tuple[int, ...]], list[Conversation]] = {}
    for row in matches:
        captions.setdefault(row.media, set()).add(row.question)
        sizes = tuple(len(item.pictures) for item in row.items)
        alike.setdefault((row.category, sizes), []).append(row)
    others: dict[int, Conversation] = {}
    for group in alike.values():
        for place, row in enumerate(group):
            following = (*group[place + 1 :], *group[:place])
            other = next((e for e in following if row.question not in captions[e.media]), None)
            if other is not None:
                others[id(row)] = _with_media_of(row, other)
    paired: list[Conversation] = []
    for row in rows:
        paired.append(row)
        if id(row) in others:
            paired.append(others[id(row)])
    return paired


def _with_media_of(row: Conversation, other: Conversation) -> Conversation:
    """A row of `match` with another row's media, whose right answer is the rejected one."""
    media = iter(other.items)
    messages = [
        replace(
            message,
            parts=tuple(next(media) if isinstance(part, Media) else part for part in message.parts),
        )
        for message in row.messages[:-1]
    ]
    answer: Message | None = row.rejected
    assert answer is not None
    return replace(
        row,
        id=f"{row.id}#mismatch",
        messages=(*messages, answer),
        rejected=row.messages[-1],
        references=replace(row.references, chosen=1),
    )
