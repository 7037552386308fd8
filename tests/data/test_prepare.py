"""From rows to micro-batches: what is dropped is counted, every unit comes once over all ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from chat_samples import IMAGE, processor, turns
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_tune.config import DataSection, MessagesSource
from vlm_tune.data.prepare import Prepared, micro_batches, prepare
from vlm_tune.data.types import IGNORE_INDEX, Conversation, Example, Media, Message
from vlm_tune.errors import DataError


def data(**options: Any) -> DataSection:
    return DataSection(train=[MessagesSource(kind="messages", path="x")], template="chatml", **options)


def row(name: str, question: str = "q?", answer: str = "yes", media: Media | None = IMAGE) -> Conversation:
    parts = (question,) if media is None else (media, question)
    return Conversation(name, (Message("user", parts), Message("assistant", (answer,))))


def test_rows_of_an_image_are_one_unit_wherever_they_stand() -> None:
    rows = [row("a"), row("b", media=Media(b"two")), row("c", "other?"), row("t", media=None), row("u", media=None)]
    plain = prepare(rows, data(), processor("chatml", "bytes", "causal"))
    assert [[e.id for e in group] for group in plain.groups] == [["a"], ["b"], ["c"], ["t"], ["u"]]
    joined = prepare(rows, data(group="image"), processor("chatml", "bytes", "causal"))
    assert [len(group) for group in joined.groups] == [1, 1, 1, 1] and joined.groups[0][0].questions == 2
    assert joined.questions == plain.questions == 5 and joined.media == plain.media == [IMAGE, Media(b"two")]
    apart = prepare(rows, data(group="image"), processor("flan", "bytes", "seq2seq"))
    assert [[e.id for e in group] for group in apart.groups] == [["a", "c"], ["b"], ["t"], ["u"]]


@pytest.mark.parametrize(("name", "layout"), [("chatml", "causal"), ("flan", "seq2seq")])
def test_overlong_rows_stop_or_are_dropped_and_counted(name: str, layout: Any) -> None:
    made = processor(name, "bytes", layout, 60)
    rows = [row("short"), row("long", "x" * 80), row("wordy", "q", "y" * 80)]
    with pytest.raises(DataError, match=r"row long: .*data\.max_length 60 \(overlong: drop"):
        prepare(rows, data(), made)
    prepared = prepare(rows, data(overlong="drop"), made)
    assert [group[0].id for group in prepared.groups] == ["short"] and len(prepared.dropped) == 2
    assert prepared.dropped[0].startswith("long: ") and "more than data.max_length 60" in prepared.dropped[0]
    with pytest.raises(DataError, match="no row is left to train on: 1 of 1 were dropped, the first: long"):
        prepare(rows[1:2], data(overlong="drop"), made)


def test_no_length_up_to_the_limit_is_dropped_and_none_past_it_is_cut() -> None:
    whole = len(prepare([row("r", "x" * 20)], data(), processor("chatml", "bytes", "causal")).groups[0][0].input_ids)
    for limit in range(1, whole + 3):
        made = processor("chatml", "bytes", "causal", limit)
        if limit < whole:
            with pytest.raises(DataError):
                prepare([row("r", "x" * 20)], data(overlong="drop"), made)
        else:
            (example,) = prepare([row("r", "x" * 20)], data(overlong="drop"), made).groups[0]
            assert len(example.input_ids) == whole and example.image_mask.sum() == 3


def unit(number: int) -> list[Example]:
    ids = np.array([number], dtype=np.int32)
    return [Example(str(number), ids, ids, np.zeros(1, dtype=bool), ())]


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_every_unit_comes_once_over_all_ranks_and_ranks_have_as_many_batches(units: int, size: int, ranks: int, epoch: int) -> None:
    prepared = Prepared([unit(number) for number in range(units)])
    by_rank = [list(micro_batches(prepared, seed=3, epoch=epoch, batch_size=size, ranks=ranks, rank=rank)) for rank in range(ranks)]
    assert len({len(batches) for batches in by_rank}) == 1
    real = [example.id for batches in by_rank for batch in batches for (example,) in batch if example.labels[0] != IGNORE_INDEX]
    assert sorted(map(int, real)) == list(range(units))
    assert all(1 <= len(batch) <= size for batches in by_rank for batch in batches)
    # Which units a step sees does not depend on the number of ranks.
    single = list(micro_batches(prepared, seed=3, epoch=epoch, batch_size=size * ranks))
    for step, batch in enumerate(single):
        over_ranks = [example.id for batches in by_rank for (example,) in batches[step] if example.labels[0] != IGNORE_INDEX]
        assert sorted(over_ranks) == sorted(example.id for (example,) in batch)


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    prepared = Prepared([unit(number) for number in range(50)])
    orders = [prepared.order(seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert orders[0] == prepared.order(0, 0).tolist() and len({tuple(order) for order in orders}) == 4


def test_prompts_past_the_limit_are_refused_by_name() -> None:
    made = processor("chatml", "bytes", "causal", 60)
    assert len(made.prompts([row("a"), row("b")])) == 2
    with pytest.raises(DataError, match=r"row long: \d+ tokens, more than 60"):
        made.prompts([row("a"), row("long", "x" * 80)])


def test_stop_ids_are_the_formats_end_and_the_tokenizers() -> None:
    made = processor("chatml", "bytes", "causal")
    assert [made.tokenizer.convert_ids_to_tokens(stop) for stop in made.stop_ids] == ["<|im_end|>", "</s>"]
    made = processor("vicuna", "bytes", "causal")
    assert made.stop_ids == [made.spec.eos_id]
    answer = made.examples(Conversation("d", turns("q", " red ")))[0]
    assert made.decode(answer.labels[answer.labels != IGNORE_INDEX].tolist()) == "red"
