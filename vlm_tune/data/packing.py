"""Joins several examples into one row.

`branch_layout` shares their common prefix, `pack_layout` concatenates separate samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlm_tune.data.types import IGNORE_INDEX, Example


@dataclass(frozen=True)
class Tree:
    """Rows of one image joined into one row by their common prefixes.

    `members` are the indices of the joined examples, `leaves` the index in `row` of the last token
    of each.
    """

    row: Example
    members: tuple[int, ...]
    leaves: tuple[int, ...]


def branch_layout(examples: Sequence[Example], row_length: int) -> list[Example]:
    """Joins a decoder's rows of one image into trees: the common prefix once, then each row's rest.

    A token keeps its position and attends to the same tokens as in its separate row, so losses and
    gradients equal those of the separate rows. A tree over `row_length` tokens is split into
    several. Rows whose common prefix does not hold all of their media are returned unchanged.
    """
    return [tree.row for tree in trees(examples, row_length)]


def trees(examples: Sequence[Example], row_length: int) -> list[Tree]:
    """As `branch_layout`, with the positions of the rows in the trees."""
    alone = [
        Tree(example, (place,), (len(example.input_ids) - 1,))
        for place, example in enumerate(examples)
    ]
    first = examples[0]
    media = int(first.image_mask.nonzero()[0][-1]) + 1 if first.image_mask.any() else 0
    if len(examples) < 2 or any(
        example.media != first.media or example.visible_until is not None for example in examples
    ):
        return alone
    shareable = [_before_first_label(example) for example in examples]
    if any(
        _shared(first, example, min(shareable[0], limit)) < max(media, 1)
        for example, limit in zip(examples, shareable, strict=True)
    ):
        return alone
    complete: list[Tree] = []
    members: list[tuple[int, int]] = []
    length = 0
    for place in sorted(
        range(len(examples)), key=lambda k: examples[k].input_ids[: shareable[k]].tolist()
    ):
        example = examples[place]
        common = (
            _shared(
                examples[members[-1][0]], example, min(shareable[place], shareable[members[-1][0]])
            )
            if members
            else 0
        )
        if members and length + len(example.input_ids) - common > row_length:
            complete.append(_tree(examples, members))
            members = []
            length = 0
            common = 0
        members.append((place, common))
        length += len(example.input_ids) - common
    return [*complete, _tree(examples, members)]


def _before_first_label(example: Example) -> int:
    """The number of leading tokens that another row may share.

    These are the tokens without a supervised target, whose next token may differ between rows.
    """
    supervised = example.labels != IGNORE_INDEX
    return int(supervised.argmax()) if supervised.any() else len(supervised) - 1


def _shared(one: Example, other: Example, limit: int) -> int:
    """The length of the common prefix of both rows, at most `limit`."""
    same = one.input_ids[:limit] == other.input_ids[:limit]
    same &= one.image_mask[:limit] == other.image_mask[:limit]
    return limit if same.all() else int(same.argmin())


def _tree(examples: Sequence[Example], members: Sequence[tuple[int, int]]) -> Tree:
    """Joins rows in lexical order into one row.

    `members` are pairs: the index of a row, and the number of tokens it shares with the row before.
    """
    first = examples[members[0][0]]
    places = tuple(place for place, _ in members)
    if len(members) == 1:
        return Tree(first, places, (len(first.input_ids) - 1,))
    rests = [
        (examples[place], common, len(examples[place].input_ids) - common)
        for place, common in members
    ]
    starts = np.cumsum([0, *(rest for _, _, rest in rests)])
    visible_until = np.empty(starts[-1], dtype=np.int32)
    # A token at depth d is visible to the end of the last row that shares more than d tokens with
    # its row.
    open_at: list[tuple[int, int]] = []  # (depth, index) of tokens whose subtree is still open
    for number, (example, common, _) in enumerate(rests):
        while open_at and open_at[-1][0] >= common:
            visible_until[open_at.pop()[1]] = starts[number]
        open_at += [
            (depth, int(starts[number]) + depth - common)
            for depth in range(common, len(example.input_ids))
        ]
    for _, index in open_at:
        visible_until[index] = starts[-1]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(example, name)[common:] for example, common, _ in rests])

    row = replace(
        first,
        input_ids=joined("input_ids"),
        labels=joined("labels"),
        image_mask=joined("image_mask"),
        positions=np.concatenate(
            [np.arange(common, common + rest) for _, common, rest in rests]
        ).astype(np.int32),
        visible_until=visible_until,
        questions=sum(example.questions for example, _, _ in rests),
    )
    return Tree(row, places, tuple((starts[1:] - 1).tolist()))


def pack_layout(examples: Sequence[Example], layout: str) -> Example:
    """Concatenates examples into one row; none attends to another.

    With the decoder layout positions start at 0 again with each example; with the seq2seq layout
    `samples` and `label_samples` number the tokens' examples.
    """
    first = examples[0]
    if len(examples) == 1:
        return first
    lengths = [len(example.input_ids) for example in examples]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(example, name) for example in examples])

    def numbered(sizes: Sequence[int]) -> np.ndarray:
        return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)

    packed = replace(
        first,
        id=", ".join(example.id for example in examples),
        input_ids=joined("input_ids"),
        labels=joined("labels"),
        image_mask=joined("image_mask"),
        media=tuple(item for example in examples for item in example.media),
        questions=sum(example.questions for example in examples),
    )
    if layout == "seq2seq":
        return replace(
            packed,
            samples=numbered(lengths),
            label_samples=numbered([len(example.labels) for example in examples]),
        )
    starts = np.cumsum([0, *lengths[:-1]])
    seen_to = [
        start + (length if example.visible_until is None else example.visible_until)
        for example, start, length in zip(examples, starts, lengths, strict=True)
    ]
    return replace(
        packed,
        positions=np.concatenate(
            [np.arange(len(e.input_ids)) if e.positions is None else e.positions for e in examples]
        ).astype(np.int32),
        visible_until=np.concatenate(
            [np.broadcast_to(end, length) for end, length in zip(seen_to, lengths, strict=True)]
        ).astype(np.int32),
    )
