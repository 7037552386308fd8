"""Joins several examples into one row.

`branch_layout` shares their common prefix, `pack_layout` concatenates separate samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlm_tune.data.types import ANSWER_KINDS, CHOSEN, IGNORE_INDEX, MISMATCHED, REJECTED, Example


@dataclass(frozen=True)
class Tree:
    """Rows of one image joined into one row by their common prefixes.

    `leaves` are the places in `row` of each branch's last token, `members` the indices of the
    joined examples that the branches are of.
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
    """As `branch_layout`, with the positions of the rows in the trees.

    An example may be a tree of answers to one prompt; these stay together.
    """
    branches = [separate_rows(example) for example in examples]
    alone = [
        Tree(example, (place,) * len(of_example), _ends(example))
        for place, (example, of_example) in enumerate(zip(examples, branches, strict=True))
    ]
    first = examples[0]
    media = int(first.image_mask.nonzero()[0][-1]) + 1 if first.image_mask.any() else 0
    if len(examples) < 2 or any(example.media != first.media for example in examples):
        return alone
    shareable = [_before_first_label(of_example[0]) for of_example in branches]
    if any(
        _shared(first, example, min(shareable[0], limit)) < max(media, 1)
        for example, limit in zip(examples, shareable, strict=True)
    ):
        return alone
    complete: list[Tree] = []
    members: list[_Member] = []
    length = 0
    for place in sorted(
        range(len(examples)), key=lambda k: examples[k].input_ids[: shareable[k]].tolist()
    ):
        added = _added(place, branches[place], members)
        size = sum(len(each.branch.input_ids) - each.common for each in added)
        if members and length + size > row_length:
            complete.append(_tree(members))
            members = []
            length = 0
            added = _added(place, branches[place], members)
            size = sum(len(each.branch.input_ids) - each.common for each in added)
        members += added
        length += size
    return [*complete, _tree(members)]


@dataclass(frozen=True)
class _Member:
    """A branch of the example at `place`.

    Its first `common` tokens are those of the branch before.
    """

    place: int
    branch: Example
    common: int


def _added(place: int, branches: Sequence[Example], members: Sequence[_Member]) -> list[_Member]:
    """An example's branches as members of a tree that has `members`."""
    added: list[_Member] = []
    before = members[-1].branch if members else None
    for branch in branches:
        common = 0
        if before is not None:
            limit = min(_before_first_label(before), _before_first_label(branch))
            common = _shared(before, branch, limit)
        added.append(_Member(place, branch, common))
        before = branch
    return added


def _ends(example: Example) -> tuple[int, ...]:
    """The places of the last tokens of a row's branches: after them positions do not continue."""
    if example.positions is None:
        return (len(example.input_ids) - 1,)
    return (*np.flatnonzero(np.diff(example.positions) != 1).tolist(), len(example.positions) - 1)


def separate_rows(example: Example) -> list[Example]:
    """The separate rows that a tree was joined from; another row by itself."""
    if example.visible_until is None:
        return [example]
    rows: list[Example] = []
    for end in _ends(example):
        path = np.flatnonzero(example.visible_until[: end + 1] > end)
        rows.append(
            replace(
                example,
                input_ids=example.input_ids[path],
                labels=example.labels[path],
                image_mask=example.image_mask[path],
                answers=None if example.answers is None else example.answers[path],
                positions=None,
                visible_until=None,
                questions=0 if rows else example.questions,
            )
        )
    return rows


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


def _tree(members: Sequence[_Member]) -> Tree:
    """Joins branches in lexical order into one row."""
    first = members[0].branch
    places = tuple(member.place for member in members)
    if len(members) == 1:
        return Tree(first, places, (len(first.input_ids) - 1,))
    rests = [
        (member.branch, member.common, len(member.branch.input_ids) - member.common)
        for member in members
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
        answers=_renumbered(members),
    )
    return Tree(row, places, tuple((starts[1:] - 1).tolist()))


def _renumbered(members: Sequence[_Member]) -> np.ndarray | None:
    """The answers of joined branches, those of each example numbered after the one before."""
    numbers: list[np.ndarray] = []
    after = 0
    first = 0
    for index, member in enumerate(members):
        answers = member.branch.answers
        if answers is None:
            return None
        if index and member.place != members[index - 1].place:
            first = after
        after = max(after, first + member.branch.answer_numbers)
        numbers.append(numbered_from(first, answers[member.common :]))
    return np.concatenate(numbers).astype(np.int32)


def numbered_from(first: int, answers: np.ndarray) -> np.ndarray:
    """The numbers of answers, with `first` added; -1 stays where there is none."""
    return np.where(answers < 0, -1, answers + first)


def answers_layout(examples: Sequence[Example]) -> Example:
    """Joins an encoder-decoder's examples of one prompt: one row whose labels are their answers."""
    row = examples[0]
    if len(examples) == 1:
        return row
    labels = [example.labels for example in examples]
    numbers = np.arange(len(examples), dtype=np.int32)
    answers = [example.answers for example in examples if example.answers is not None]
    return replace(
        row,
        labels=np.concatenate(labels),
        label_samples=np.repeat(numbers, [len(each) for each in labels]),
        answers=np.concatenate(answers) if answers else None,
        questions=sum(example.questions for example in examples),
    )


def pair_layout(chosen: Example, rejected: Example, layout: str) -> Example:
    """The chosen and the rejected answer to one prompt as one row, in which the prompt is once."""
    return _answered_layout([numbered(chosen, CHOSEN), numbered(rejected, REJECTED)], layout)


def group_layout(completed: Sequence[Example], layout: str) -> Example:
    """Completions of one prompt as one row, in which the prompt is once.

    They have the numbers of answers that are judged alone.
    """
    rows = [
        numbered(example, ANSWER_KINDS * place + CHOSEN) for place, example in enumerate(completed)
    ]
    return _answered_layout(rows, layout)


def _answered_layout(answered: Sequence[Example], layout: str) -> Example:
    """Numbered answers to one prompt, which count as one question, as one row."""
    first, *others = answered
    rows = [first, *(replace(other, questions=0) for other in others)]
    if layout == "seq2seq":
        return answers_layout(rows)
    return _tree(_added(0, rows, [])).row


def prompt_of(example: Example, layout: str) -> Example:
    """A separate row up to its last answer; it has no labels."""
    if layout == "seq2seq":
        return replace(example, labels=example.labels[:0])
    supervised = example.labels != IGNORE_INDEX
    begins = np.flatnonzero(supervised & ~np.concatenate([[False], supervised[:-1]]))
    end = int(begins[-1]) + 1 if len(begins) else len(supervised)
    return replace(
        example,
        input_ids=example.input_ids[:end],
        labels=np.full(end, IGNORE_INDEX, dtype=np.int32),
        image_mask=example.image_mask[:end],
    )


def completed(prompt: Example, ids: Sequence[int], layout: str) -> Example:
    """A prompt with a completion, whose ids, at least one, are all supervised."""
    answer = np.asarray(ids, dtype=np.int32)
    if layout == "seq2seq":
        return replace(prompt, labels=answer)
    before = np.full(len(prompt.input_ids) - 1, IGNORE_INDEX, dtype=np.int32)
    return replace(
        prompt,
        # The prompt's last token predicts the completion's first one.
        input_ids=np.concatenate([prompt.input_ids, answer[:-1]]),
        labels=np.concatenate([before, answer]),
        image_mask=np.concatenate([prompt.image_mask, np.zeros(len(answer) - 1, dtype=bool)]),
    )


def with_mismatched(
    unit: Sequence[Example], other: Sequence[Example], layout: str
) -> list[Example]:
    """The unit with an answer of another one after each of its prompts, of the kind MISMATCHED.

    Both are rows of preferences; the answers are taken in turn from the other unit's examples.
    """
    if layout == "seq2seq":
        return [
            _with_labels(example, other[place % len(other)]) for place, example in enumerate(unit)
        ]
    foreign = [separate_rows(example)[0] for example in other]
    return [_with_branches(example, foreign) for example in unit]


def _with_branches(example: Example, foreign: Sequence[Example]) -> Example:
    """A decoder's row with a branch for each of its prompts, in which another row's answer is."""
    branches: list[Example] = []
    rows = separate_rows(example)
    prompts = [_prompt_number(row) for row in rows]
    for place, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        branches.append(row)
        if place + 1 == len(rows) or prompts[place + 1] != prompt:
            number = ANSWER_KINDS * prompt + MISMATCHED
            branches.append(_answered(row, foreign[prompt % len(foreign)], number))
    return _tree(_added(0, branches, [])).row


def _answered(row: Example, other: Example, number: int) -> Example:
    """A decoder's separate row with the answer of another one, which gets a number."""
    end = _before_first_label(row)
    start = _before_first_label(other)

    def continued(name: str) -> np.ndarray:
        # The prompt's last token predicts the answer's first one.
        return np.concatenate([getattr(row, name)[: end + 1], getattr(other, name)[start + 1 :]])

    labels = np.concatenate([row.labels[:end], other.labels[start:]])
    answered = replace(
        row,
        input_ids=continued("input_ids"),
        image_mask=continued("image_mask"),
        labels=labels,
        questions=0,
    )
    return numbered(answered, number)


def _prompt_number(row: Example) -> int:
    """The number of the prompt that a separate row of preferences is of."""
    assert row.answers is not None
    return int(row.answers.max()) // ANSWER_KINDS


def _with_labels(example: Example, other: Example) -> Example:
    """An encoder-decoder's row of one prompt with the first answer of another row."""
    assert example.answers is not None and other.answers is not None
    answer = other.labels[other.answers == other.answers[0]]
    samples = np.zeros(len(example.labels), dtype=np.int32)
    samples = samples if example.label_samples is None else example.label_samples
    return replace(
        example,
        labels=np.concatenate([example.labels, answer]),
        label_samples=np.concatenate(
            [samples, np.full(len(answer), samples.max() + 1, dtype=np.int32)]
        ),
        answers=np.concatenate([example.answers, np.full(len(answer), MISMATCHED, dtype=np.int32)]),
    )


def numbered(example: Example, number: int) -> Example:
    """The example with all of its labels as the answer of this number."""
    return replace(
        example, answers=np.where(example.labels == IGNORE_INDEX, -1, number).astype(np.int32)
    )


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

    def sample_numbers(sizes: Sequence[int]) -> np.ndarray:
        return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)

    packed = replace(
        first,
        id=", ".join(example.id for example in examples),
        input_ids=joined("input_ids"),
        labels=joined("labels"),
        image_mask=joined("image_mask"),
        media=tuple(item for example in examples for item in example.media),
        questions=sum(example.questions for example in examples),
        **_packed_answers(examples),
    )
    if layout == "seq2seq":
        return replace(
            packed,
            samples=sample_numbers(lengths),
            label_samples=sample_numbers([len(example.labels) for example in examples]),
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


def _packed_answers(examples: Sequence[Example]) -> dict[str, np.ndarray | None]:
    """The fields of packed rows of preferences, empty for other rows."""
    answers = [example.answers for example in examples if example.answers is not None]
    if not answers:
        return {}
    firsts = np.cumsum([0, *(example.answer_numbers for example in examples[:-1])]).tolist()
    references = [example.reference for example in examples if example.reference is not None]
    return {
        "answers": np.concatenate(
            [numbered_from(first, of_row) for of_row, first in zip(answers, firsts, strict=True)]
        ).astype(np.int32),
        "reference": np.concatenate(references) if references else None,
    }
