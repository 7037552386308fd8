"""Joined rows are the rows they came from.

What each token is, what it sees, and what it predicts.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.chat_samples import IMAGE, IMAGE_SLOTS, processor, turns
from vlm_tune.data.packing import branch_layout, pack_layout
from vlm_tune.data.types import IGNORE_INDEX, Conversation, Example, Media

Row = tuple[tuple[int, ...], tuple[int, ...]]


def row(
    ids: list[int],
    labels: list[int],
    *,
    media: tuple[Media, ...] = (IMAGE,),
    slots: int = 2,
    name: str = "r",
) -> Example:
    """`slots` image slots, then `ids`; a label of 0 is no label."""
    return Example(
        name,
        np.array([9] * slots + ids, dtype=np.int32),
        np.array(
            [IGNORE_INDEX] * slots + [label or IGNORE_INDEX for label in labels], dtype=np.int32
        ),
        np.array([True] * slots + [False] * len(ids)),
        media,
    )


def rows_in(joined: Example) -> list[Row]:
    """The rows that a joined one stands for.

    Each token that no other continues, with all that it sees.
    """
    length = len(joined.input_ids)
    visible_until = (
        np.full(length, length) if joined.visible_until is None else joined.visible_until
    )
    positions = np.arange(length) if joined.positions is None else joined.positions
    rows = []
    for leaf in range(length):
        if leaf + 1 < length and visible_until[leaf] > leaf + 1:
            continue
        seen = [place for place in range(leaf + 1) if leaf < visible_until[place]]
        assert positions[seen].tolist() == list(range(len(seen)))
        rows.append((tuple(joined.input_ids[seen].tolist()), tuple(joined.labels[seen].tolist())))
    return rows


def as_row(example: Example) -> Row:
    return tuple(example.input_ids.tolist()), tuple(example.labels.tolist())


def test_rows_of_one_image_share_what_they_begin_with() -> None:
    rows = [
        row([1, 5, 6], [0, 0, 6]),
        row([1, 7, 8, 9], [0, 0, 8, 9], name="s"),
        row([1, 7, 3], [0, 0, 4]),
    ]
    (joined,) = branch_layout(rows, 99)
    assert joined.visible_until is not None and joined.positions is not None
    assert joined.input_ids.tolist() == [9, 9, 1, 5, 6, 7, 8, 9, 3]
    assert joined.positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 4]
    assert joined.visible_until.tolist() == [9, 9, 9, 5, 5, 9, 8, 8, 9]
    assert joined.labels.tolist() == [-100, -100, -100, -100, 6, -100, 8, 9, 4]
    assert joined.image_mask.tolist() == [True, True] + [False] * 7
    assert joined.media == (IMAGE,) and joined.questions == 3


def test_the_same_question_twice_keeps_both_labels() -> None:
    rows = [row([1, 2], [0, 5]), row([1, 2], [0, 6]), row([1, 2], [0, 5])]
    (joined,) = branch_layout(rows, 99)
    assert joined.input_ids.tolist() == [9, 9, 1, 2, 2, 2]
    assert sorted(joined.labels.tolist()) == [-100, -100, -100, 5, 5, 6]


@pytest.mark.parametrize(
    "rows",
    [
        [row([1, 5], [0, 5])],
        [row([1, 5], [0, 5]), row([1, 6], [0, 6], media=(Media(b"two"),))],
        [row([1, 5], [0, 5], media=(), slots=0), row([2, 6], [0, 6], media=(), slots=0)],
    ],
    ids=["alone", "other image", "no common prefix"],
)
def test_rows_that_share_nothing_come_back_unchanged(rows: list[Example]) -> None:
    assert branch_layout(rows, 99) == rows


def test_an_image_that_is_not_in_the_common_prefix_stays_in_its_row() -> None:
    late = [
        Example(
            "l",
            np.array([1, n, 9, 9, 5]),
            np.array([-100, -100, -100, -100, 5]),
            np.array([0, 0, 1, 1, 0], dtype=bool),
            (IMAGE,),
        )
        for n in (2, 3)
    ]
    assert branch_layout(late, 99) == late


texts = st.lists(st.integers(1, 3), max_size=5)


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
    st.lists(st.tuples(texts, texts.filter(bool)), min_size=2, max_size=7),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_joined_rows_are_the_rows_they_came_from(
    prefix: list[int], rest: list[tuple[list[int], list[int]]], data: st.DataObject
) -> None:
    rows = [
        row([*prefix, *question, *answer], [0] * (len(prefix + question) - 1) + [*answer, 4])
        for question, answer in rest
    ]
    limit = data.draw(st.integers(5, 60))
    joined = branch_layout(rows, limit)
    assert sorted(branch for example in joined for branch in rows_in(example)) == sorted(
        map(as_row, rows)
    )
    assert sum(example.supervised for example in joined) == sum(r.supervised for r in rows)
    assert sum(example.questions for example in joined) == len(rows)
    assert all(
        len(example.input_ids) <= max(limit, *(len(r.input_ids) for r in rows))
        for example in joined
    )
    assert sum(len(example.input_ids) for example in joined) <= sum(len(r.input_ids) for r in rows)
    packed = pack_layout(joined, "causal")
    assert sorted(rows_in(packed)) == sorted(map(as_row, rows))
    assert packed.media == (IMAGE,) * len(joined) and packed.image_mask.sum() == 2 * len(joined)


def test_branches_of_a_real_format_share_system_text_image_and_first_words() -> None:
    chat_processor = processor("smollm2", "bytes", "causal")
    rows = [
        chat_processor.examples(Conversation(q, turns(q, "yes", image=True)))[0]
        for q in ("one?", "only?", "two?")
    ]
    (joined,) = branch_layout(rows, 4096)
    assert sorted(rows_in(joined)) == sorted(map(as_row, rows))
    # "one?" and "only?" share their first letters too.
    (distinct,) = branch_layout([rows[0], rows[2]], 4096)
    one, only, two = (len(r.input_ids) for r in rows)
    prefix = one + two - len(distinct.input_ids)
    assert prefix > IMAGE_SLOTS and len(joined.input_ids) == prefix + (one - prefix) + (
        two - prefix
    ) + (only - prefix - len("on"))


def test_packed_rows_of_an_encoder_decoder_know_their_samples() -> None:
    packed = pack_layout([row([1, 5], [3]), row([6], [4, 4], media=(), slots=0)], "seq2seq")
    assert packed.samples is not None and packed.label_samples is not None
    assert packed.samples.tolist() == [0, 0, 0, 0, 1]
    assert packed.label_samples.tolist() == [0] * 3 + [1] * 2
    assert packed.visible_until is None and packed.positions is None
