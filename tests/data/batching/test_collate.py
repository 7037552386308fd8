"""Batches: padding on either side, labels at their tokens, each image once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlm_tune.data.batching.collate import collate
from vlm_tune.data.packing import branch_layout, pack_layout
from vlm_tune.data.types import IGNORE_INDEX, Example, InputSpec, Media

A, B = Media(b"a"), Media(b"b")
CAUSAL, SEQ2SEQ = InputSpec(2, "causal", 99, 0, 1), InputSpec(2, "seq2seq", 99, 0, 1)


def example(name: str, ids: list[int], labels: list[int], media: tuple[Media, ...] = ()) -> Example:
    slots = [True] * (2 * len(media))
    return Example(
        name,
        np.array([0] * len(slots) + ids, dtype=np.int32),
        np.array(labels, dtype=np.int32),
        np.array(slots + [False] * len(ids), dtype=bool),
        media,
        category=f"kind {name}",
    )


def causal(name: str, ids: list[int], media: tuple[Media, ...] = ()) -> Example:
    return example(name, ids, [-100] * (2 * len(media) + len(ids) - 1) + [7], media)


def fetch(media: Media) -> torch.Tensor:
    return torch.full((3, 4, 4), media.source[0], dtype=torch.uint8)  # type: ignore[index]


@pytest.mark.parametrize("left", [False, True])
def test_padding_keeps_every_row_together_on_its_side(left: bool) -> None:
    rows = [causal("x", [5, 6, 7]), causal("y", [8], (A,)), causal("z", [9, 4])]
    batch = collate(rows, CAUSAL, fetch=fetch, pad_left=left)
    assert batch.input_ids.shape == batch.labels.shape == batch.attention_mask.shape == (3, 3)
    for number, row in enumerate(rows):
        size = len(row.input_ids)
        assert batch.attention_mask[number].tolist() == (
            [False] * (3 - size) + [True] * size if left else [True] * size + [False] * (3 - size)
        )
        keep = batch.attention_mask[number]
        assert batch.input_ids[number][keep].tolist() == row.input_ids.tolist()
        assert batch.labels[number][keep].tolist() == row.labels.tolist()
        assert batch.image_mask[number][keep].tolist() == row.image_mask.tolist()
        assert (batch.labels[number][~keep] == IGNORE_INDEX).all() and not batch.image_mask[number][
            ~keep
        ].any()
        assert (batch.input_ids[number][~keep] == CAUSAL.pad_id).all()
    assert batch.ids == ["x", "y", "z"] and batch.categories == ["kind x", "kind y", "kind z"]
    assert (
        batch.tokens == 8
        and batch.supervised == 3
        and batch.questions == 3
        and batch.positions is None
    )


def test_shared_images_come_once_and_the_index_follows_row_order() -> None:
    rows = [
        causal("x", [5], (B, A)),
        causal("y", [5]),
        causal("z", [5], (A,)),
        causal("w", [5], (B,)),
    ]
    batch = collate(rows, CAUSAL, fetch=fetch)
    assert batch.pixels is not None and batch.features is None
    assert batch.pixels[:, 0, 0, 0].tolist() == [ord("b"), ord("a")]
    assert batch.media_index.tolist() == [0, 1, 1, 0]
    assert batch.image_mask.sum() == 2 * len(batch.media_index)
    # Equal bytes are one image, whichever object they came in.
    assert collate(
        [causal("x", [5], (Media(b"a"),)), rows[2]], CAUSAL, fetch=fetch
    ).media_index.tolist() == [0, 0]


def test_cached_features_take_the_place_of_pixels() -> None:
    batch = collate(
        [causal("x", [5], (A,))], CAUSAL, fetch=lambda media: torch.ones(2, 7), cached=True
    )
    assert batch.pixels is None and batch.features is not None and batch.features.shape == (1, 2, 7)


def test_a_batch_without_images_fetches_nothing() -> None:
    batch = collate([causal("x", [5])], CAUSAL, fetch=fetch)
    assert batch.pixels is None and batch.features is None and batch.media_index.tolist() == []


def test_seq2seq_labels_have_a_width_of_their_own() -> None:
    rows = [
        example("x", [5, 6, 7], [3, 1]),
        example("y", [8], [3, 3, 3, 1], (A,)),
        example("p", [8], []),
    ]
    for left in (False, True):
        batch = collate(rows, SEQ2SEQ, fetch=fetch, pad_left=left)
        assert batch.labels.tolist() == [[3, 1, -100, -100], [3, 3, 3, 1], [-100] * 4]
    assert collate(rows[2:], SEQ2SEQ).labels.tolist() == [[-100]]


def test_joined_and_plain_rows_stand_in_one_batch() -> None:
    (joined,) = branch_layout([causal("x", [5, 6, 7], (A,)), causal("y", [5, 8, 9], (A,))], 99)
    batch = collate([causal("z", [4, 4]), joined], CAUSAL, fetch=fetch)
    assert batch.positions is not None and batch.visible_until is not None and batch.samples is None
    assert batch.positions.tolist() == [[0, 1, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 3, 4]]
    assert batch.visible_until.tolist() == [[2, 2, 0, 0, 0, 0, 0], [7, 7, 7, 5, 5, 7, 7]]
    assert batch.questions == 3


def test_rows_padded_on_the_left_see_the_same_tokens() -> None:
    (joined,) = branch_layout([causal("x", [5, 6, 7], (A,)), causal("y", [5, 8, 9], (A,))], 99)
    batch = collate([joined, causal("z", [4, 4])], CAUSAL, fetch=fetch, pad_left=True)
    assert batch.visible_until is not None
    assert batch.visible_until.tolist() == [[7, 7, 7, 5, 5, 7, 7], [0, 0, 0, 0, 0, 7, 7]]


def test_packed_and_plain_rows_of_an_encoder_decoder_stand_in_one_batch() -> None:
    packed = pack_layout(
        [example("x", [5, 6], [3, 1]), example("y", [8], [4, 4, 1], (A,))], "seq2seq"
    )
    batch = collate([packed, example("z", [4], [2, 1])], SEQ2SEQ, fetch=fetch)
    assert batch.samples is not None and batch.label_samples is not None
    assert batch.samples.tolist() == [[0, 0, 1, 1, 1], [0, -1, -1, -1, -1]]
    assert batch.label_samples.tolist() == [[0, 0, 1, 1, 1], [0, 0, -1, -1, -1]]
    assert batch.labels.tolist() == [[3, 1, 4, 4, 1], [2, 1, -100, -100, -100]]
    assert batch.questions == 3 and batch.media_index.tolist() == [0]
