"""Several examples as one row: `branch_layout` shares what they have in common, `pack_layout` keeps them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlm_tune.data.types import IGNORE_INDEX, Example


@dataclass(frozen=True)
class Tree:
    """Rows of one image as one row: which of the rows given it holds, and where each of them ends in it."""

    row: Example
    members: tuple[int, ...]
    leaves: tuple[int, ...]


def branch_layout(examples: Sequence[Example], row_length: int) -> list[Example]:
    """A decoder's rows of one image as a tree: what they begin with comes once, then each row's own rest.

    A token keeps its position and sees what it saw in its own row, so losses and gradients are those of the rows one
    by one. Rows over `row_length` tokens become several; rows that don't begin with all of their media come back
    unchanged.
    """
    return [tree.row for tree in trees(examples, row_length)]


def trees(examples: Sequence[Example], row_length: int) -> list[Tree]:
    """As `branch_layout`, with the places of the rows in the trees."""
    alone = [
        Tree(example, (place,), (len(example.input_ids) - 1,))
        for place, example in enumerate(examples)
    ]
    first = examples[0]
    media = int(first.image_mask.nonzero()[0][-1]) + 1 if first.image_mask.any() else 0
    if len(examples) < 2 or any(
        example.media != first.media or example.ends is not None for example in examples
    ):
        return alone
    shareable = [_before_first_label(example) for example in examples]
    if any(
        _shared(first, example, min(shareable[0], own)) < max(media, 1)
        for example, own in zip(examples, shareable, strict=True)
    ):
        return alone
    found: list[Tree] = []
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
            found.append(_tree(examples, members))
            members = []
            length = 0
            common = 0
        members.append((place, common))
        length += len(example.input_ids) - common
    return [*found, _tree(examples, members)]


def _before_first_label(example: Example) -> int:
    """How many tokens another row may share: those that predict nothing trained, whose next token may differ."""
    supervised = example.labels != IGNORE_INDEX
    return int(supervised.argmax()) if supervised.any() else len(supervised) - 1


def _shared(one: Example, other: Example, limit: int) -> int:
    """How many of the first `limit` tokens are the same in both."""
    same = one.input_ids[:limit] == other.input_ids[:limit]
    same &= one.image_mask[:limit] == other.image_mask[:limit]
    return limit if same.all() else int(same.argmin())


def _tree(examples: Sequence[Example], members: Sequence[tuple[int, int]]) -> Tree:
    """Rows in lexical order, by their place and the number of tokens they share with the row before, as one row."""
    first = examples[members[0][0]]
    places = tuple(place for place, _ in members)
    if len(members) == 1:
        return Tree(first, places, (len(first.input_ids) - 1,))
    rests = [
        (examples[place], common, len(examples[place].input_ids) - common)
        for place, common in members
    ]
    starts = np.cumsum([0, *(rest for _, _, rest in rests)])
    ends = np.empty(starts[-1], dtype=np.int32)
    # A row's token at depth d is seen to the end of the last row that shares more than d tokens with it.
    open_at: list[tuple[int, int]] = []  # (depth, index) of tokens whose subtree is still open
    for number, (example, common, _) in enumerate(rests):
        while open_at and open_at[-1][0] >= common:
            ends[open_at.pop()[1]] = starts[number]
        open_at += [
            (depth, int(starts[number]) + depth - common)
            for depth in range(common, len(example.input_ids))
        ]
    for _, index in open_at:
        ends[index] = starts[-1]

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
        ends=ends,
        questions=sum(example.questions for example, _, _ in rests),
    )
    return Tree(row, places, tuple((starts[1:] - 1).tolist()))


def pack_layout(examples: Sequence[Example], layout: str) -> Example:
    """Examples side by side in one row, none of which sees another; positions start anew with each."""
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
        start + (length if example.ends is None else example.ends)
        for example, start, length in zip(examples, starts, lengths, strict=True)
    ]
    return replace(
        packed,
        positions=np.concatenate(
            [np.arange(len(e.input_ids)) if e.positions is None else e.positions for e in examples]
        ).astype(np.int32),
        ends=np.concatenate(
            [np.broadcast_to(end, length) for end, length in zip(seen_to, lengths, strict=True)]
        ).astype(np.int32),
    )
