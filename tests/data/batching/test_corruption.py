"""Span corruption: how much is masked, that nothing is lost, and that it depends on the epoch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vlm_tune.data.batching.corruption import Corruption, random_spans
from vlm_tune.data.types import IGNORE_INDEX, Example

SENTINELS = tuple(range(900, 910))
END = 1


def example(length: int, name: str = "a") -> Example:
    """A row of a prompt of three tokens with an image, and an answer of `length` tokens."""
    labels = np.array([*range(100, 100 + length), END], dtype=np.int32)
    slots = np.array([True, False, False])
    return Example(name, np.array([0, 5, 6], dtype=np.int32), labels, slots, ())


def corruption(rate: float = 0.15, mean_span: float = 3.0) -> Corruption:
    return Corruption(rate, mean_span, SENTINELS, END, seed=0)


def restored(corrupted: Example) -> list[int]:
    """The answer, from what the encoder reads and what the decoder gives."""
    spans: dict[int, list[int]] = {}
    for token in corrupted.labels[:-1].tolist():
        if token in SENTINELS:
            spans[token] = []
        else:
            list(spans.values())[-1].append(token)
    tokens: list[int] = []
    for token in corrupted.input_ids[3:].tolist():
        tokens += spans.pop(token) if token in SENTINELS else [token]
    assert not spans
    return tokens


@pytest.mark.parametrize("length", [1, 2, 3, 7, 40, 200])
@pytest.mark.parametrize(("rate", "mean_span"), [(0.15, 3.0), (0.5, 1.0), (0.9, 8.0)])
def test_the_sentinels_stand_for_the_spans_that_the_decoder_gives(
    length: int, rate: float, mean_span: float
) -> None:
    row = example(length)
    corrupted = corruption(rate, mean_span).of_example(row, epoch=0)
    assert restored(corrupted) == row.labels[:-1].tolist()
    assert corrupted.labels[-1] == END and corrupted.labels[0] == SENTINELS[0]
    used = [token for token in corrupted.input_ids.tolist() if token in SENTINELS]
    assert used == list(SENTINELS[: len(used)])
    assert corrupted.input_ids[:3].tolist() == [0, 5, 6]
    assert corrupted.image_mask.tolist() == [True] + [False] * (len(corrupted.input_ids) - 1)


def test_a_sixth_of_the_tokens_is_masked_in_spans_of_three_at_even_places() -> None:
    random = np.random.default_rng(0)
    places = np.zeros(100)
    lengths: Counter[int] = Counter()
    for _ in range(400):
        mask = random_spans(100, 0.15, 3.0, most=100, random=random)
        assert mask.sum() == 15
        places += mask
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
        lengths.update((edges[1::2] - edges[::2]).tolist())
    assert sum(lengths.values()) == 400 * 5  # spans of 3 on average
    assert len(lengths) > 5
    # The first token is never masked and the last always, as in T5's code.
    assert places[0] == 0 and places[-1] == 400
    middle = places[20:80].reshape(6, 10).mean(1) / 400
    assert middle.min() > 0.08 and middle.max() < 0.22


def test_spans_differ_by_epoch_and_row_and_are_the_same_again() -> None:
    def shown(epoch: int, name: str) -> list[int]:
        return corruption().of_example(example(40, name), epoch).input_ids.tolist()

    assert shown(0, "a") == shown(0, "a")
    assert shown(0, "a") != shown(1, "a")
    assert shown(0, "a") != shown(0, "b")


def test_no_more_spans_than_there_are_sentinels() -> None:
    corrupted = corruption(0.5, 1.0).of_example(example(300), epoch=0)
    assert set(SENTINELS) < set(corrupted.input_ids.tolist())
    assert restored(corrupted) == example(300).labels[:-1].tolist()


def test_a_row_that_fills_up_a_batch_stays_as_it_is() -> None:
    row = example(4)
    row.labels[:] = IGNORE_INDEX
    assert corruption().of_example(row, epoch=0) is row
