"""Which tokens prompts share, and that what is remembered stays within its bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlm_tune.model.language.row_buffers import Prefix
from vlm_tune.serving.prefixes import Beginning, Prefixes, Remembered, longest_prefix


def beginning(ids: list[int], *images: str) -> Beginning:
    """A prompt of ids, in which -1 - k is a slot of image k."""
    return Beginning(np.array(ids, dtype=np.int64).tobytes(), tuple(map(str.encode, images)))


@pytest.mark.parametrize(
    ("mine", "theirs", "common"),
    [
        (beginning([5, 6, 7]), beginning([5, 6, 8]), 2),
        # One token is left, whose hidden states predict the answer.
        (beginning([5, 6, 7]), beginning([5, 6, 7]), 2),
        (beginning([5, 6, 7, 8]), beginning([5, 6]), 2),
        (beginning([5]), beginning([5]), 0),
        (beginning([5, -1, -1, 6, 7], "a"), beginning([5, -1, -1, 6, 9], "a"), 4),
        # Images of other bytes have the same ids in their slots.
        (beginning([5, -1, -1, 6, 7], "a"), beginning([5, -1, -1, 6, 7], "b"), 1),
        (beginning([-1, -1, -2, -2, 6], "a", "b"), beginning([-1, -1, -2, -2, 6], "a", "c"), 2),
        # An image is computed as a whole.
        (beginning([5, -1, -1], "a"), beginning([5, -1, -1, 6], "a"), 1),
        (beginning([-1, -1, -2, -2], "a", "b"), beginning([-1, -1, -2, -2, 6], "a", "b"), 2),
    ],
)
def test_prompts_share_whole_images_and_leave_a_token(
    mine: Beginning, theirs: Beginning, common: int
) -> None:
    assert mine.common(theirs) == common


def test_a_beginning_ends_with_an_image() -> None:
    whole = beginning([5, -1, -1, 6, -2, -2, 7], "a", "b")
    assert (len(whole), whole.images_end) == (7, 6)
    assert whole.first(3) == beginning([5, -1, -1], "a")
    assert whole.first(6) == beginning([5, -1, -1, 6, -2, -2], "a", "b")
    assert beginning([5, 6]).images_end == 0


def prefix_of(length: int) -> Prefix:
    """Keys and values of one layer, which count the tokens."""
    values = torch.arange(float(length)).expand(1, 1, length).mT.contiguous()
    return Prefix([[values, values]], length)


def test_the_longest_prefix_is_cut_to_what_is_shared() -> None:
    prefixes = Prefixes(10_000)
    prefixes.put(beginning([5, -1, -1], "a"), prefix_of(3))
    prefixes.put(beginning([5, -1, -1, 6, -2, -2], "a", "b"), prefix_of(6))
    both = longest_prefix(prefixes, beginning([5, -1, -1, 6, -2, -2, 9], "a", "b"))
    assert both is not None and both.length == 6
    one = longest_prefix(prefixes, beginning([5, -1, -1, 6, -2, -2, 9], "a", "c"))
    assert one is not None and one.length == 4
    assert one.layers[0][0].flatten().tolist() == [0, 1, 2, 3]
    assert longest_prefix(prefixes, beginning([7, 8])) is None


def test_the_entries_used_least_recently_go() -> None:
    remembered: Remembered[str, torch.Tensor] = Remembered(100)
    for name in "abc":
        remembered.put(name, torch.zeros(10))
    assert "a" not in remembered and len(remembered) == 2 and remembered.nbytes == 80
    assert remembered.get("b") is not None
    remembered.put("d", torch.zeros(10))
    assert remembered.by_use() == ["b", "d"]
    # One that is larger than all may be is not remembered, and drives out no other.
    remembered.put("e", torch.zeros(100))
    remembered.put("d", torch.zeros(10))
    assert remembered.by_use() == ["b", "d"] and remembered.nbytes == 80
    assert remembered.get("e") is None


def test_entries_may_be_few_however_small_they_are() -> None:
    remembered: Remembered[int, torch.Tensor] = Remembered(1000, 2)
    for number in range(4):
        remembered.put(number, torch.zeros(1))
    assert remembered.by_use() == [2, 3] and remembered.nbytes == 8
