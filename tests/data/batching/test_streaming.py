"""Streams: ratios to the row, batches by their number, bounded reading, bad rows by policy."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.chat_samples import processor
from tests.helpers.row_samples import write_rows
from vlm_tune.config.data import DataSection, FileSource
from vlm_tune.data.batch import Batch
from vlm_tune.data.batching.loader import Position
from vlm_tune.data.batching.streaming import StreamFeed, mixed, shuffled
from vlm_tune.data.types import Media
from vlm_tune.errors import DataError


def talk(text: str) -> dict[str, Any]:
    return {
        "id": text,
        "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}],
    }


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Files of 30 and of 10 rows."""
    return [
        write_rows(tmp_path / f"{name}.jsonl", [talk(f"{name}{n}") for n in range(rows)])
        for name, rows in (("a", 30), ("b", 10))
    ]


def feed(
    files: list[Path],
    *,
    size: int = 4,
    rank: int = 0,
    ranks: int = 1,
    weights: tuple[float, ...] = (3.0, 1.0),
    accumulation: int = 1,
    losses: tuple[float, ...] = (1.0, 1.0),
    **options: Any,
) -> StreamFeed:
    sources = [
        FileSource(kind="file", path=str(path), weight=weight, loss_weight=loss_weight)
        for path, weight, loss_weight in zip(files, weights, losses, strict=False)
    ]
    data = DataSection(train=list(sources), template="chatml", streaming=True, **options)
    return StreamFeed(
        data,
        sources,
        processor("chatml", "bytes", "causal"),
        fetch,
        size,
        seed=5,
        rank=rank,
        ranks=ranks,
        accumulation=accumulation,
    )


def fetch(media: Media) -> torch.Tensor:
    raise DataError(f"{media.name}: cut")


def draw(stream: StreamFeed, steps: int, first: int = 0) -> list[Batch]:
    """The micro-batches of a number of steps."""
    return [
        batch for window in islice(stream.windows(Position(step=first)), steps) for batch in window
    ]


def ids(batches: list[Batch]) -> list[list[str]]:
    return [[name.split(":")[1] for name in batch.ids] for batch in batches]


def test_ratios_hold_to_the_row(files: list[Path]) -> None:
    stream = feed(files)
    drawn = [number for number, _ in islice(mixed(stream.readers, stream.sources, 5), 400)]
    for end in range(4, 401):
        assert abs(drawn[:end].count(0) - 0.75 * end) < 1
    rows = Counter(
        row.id  # type: ignore[union-attr]
        for _, row in islice(mixed(stream.readers, stream.sources, 5), 400)
    )
    assert set(rows.values()) == {10}


def test_a_buffer_mixes_and_loses_nothing() -> None:
    rows: Any = ((0, number) for number in range(1000))
    shuffled_rows = [row for _, row in islice(shuffled(rows, 50, 1), 900)]
    assert len(set(shuffled_rows)) == 900 and shuffled_rows != sorted(shuffled_rows)
    # A row is never drawn before it was read.
    assert all(row <= place + 50 for place, row in enumerate(shuffled_rows))


def test_batches_are_a_function_of_their_number(files: list[Path]) -> None:
    whole = ids(draw(feed(files, shuffle_buffer=16), 12))
    assert ids(draw(feed(files, shuffle_buffer=16), 5, 7)) == whole[7:]
    assert len({name for batch in whole for name in batch}) > 20


def test_processes_share_the_rows_of_one(files: list[Path]) -> None:
    single = ids(draw(feed(files, size=4, shuffle_buffer=8), 6))
    shares = [
        ids(draw(feed(files, size=2, rank=rank, ranks=2, shuffle_buffer=8), 6)) for rank in range(2)
    ]
    assert [sorted(batch) for batch in single] == [
        sorted(one + other) for one, other in zip(*shares, strict=True)
    ]


def test_bad_rows_leave_a_batch_smaller_and_are_counted(tmp_path: Path) -> None:
    rows = [talk("good"), {"messages": []}, {**talk("cut"), "images": [str(tmp_path / "no.png")]}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"rows\.jsonl, row [23]: "):
        draw(feed([path], shuffle_buffer=1), 3)
    errors: list[DataError] = []
    stream = feed([path], size=3, shuffle_buffer=1, on_bad_row="skip", max_bad_rows=6)
    stream.report = errors.append
    assert ids(draw(stream, 3)) == [["good"]] * 3
    assert stream.bad == 6 and {error.row for error in errors} == {2, 3}
    with pytest.raises(DataError, match="more than 6 bad rows"):
        draw(stream, 1)


def test_a_batch_without_a_usable_row_counts_nothing(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [talk("good"), {"messages": []}])
    stream = feed([path], size=1, shuffle_buffer=1, on_bad_row="skip")
    batches = draw(stream, 6)
    assert sorted(batch.supervised > 0 for batch in batches) == [False] * 3 + [True] * 3
    assert [batch.questions for batch in batches if not batch.supervised] == [0] * 3


def test_packed_streams_fill_their_rows(files: list[Path]) -> None:
    plain = draw(feed(files, size=8, shuffle_buffer=8), 3)
    packed = draw(feed(files, size=8, shuffle_buffer=8, packing=True, row_length=256), 3)
    for one, other in zip(plain, packed, strict=True):
        assert (
            other.tokens == one.tokens
            and other.supervised == one.supervised
            and len(other.ids) < len(one.ids)
        )
        assert other.visible_until is not None


def test_an_empty_source_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        draw(feed([tmp_path / "rows.jsonl"]), 1)


def shards(tmp_path: Path, rank: int, ranks: int, planned: int = 2) -> StreamFeed:
    """A feed of two rows a planned process, each of which has its own of six files of five rows."""
    for file in range(6):
        write_rows(tmp_path / f"shard-{file}.jsonl", [talk(f"{file}-{row}") for row in range(5)])
    source = FileSource(kind="file", path=str(tmp_path / "shard-*.jsonl"))
    data = DataSection(
        train=[source], template="chatml", streaming=True, own_shards=True, shuffle_buffer=8
    )
    chat_processor = processor("chatml", "bytes", "causal")
    return StreamFeed(
        data, [source], chat_processor, fetch, 2, seed=5, rank=rank, ranks=ranks, planned=planned
    )


def test_each_process_reads_its_own_shards(tmp_path: Path) -> None:
    shares = [ids(draw(shards(tmp_path, rank, 2), 9)) for rank in range(2)]
    files = [{name.partition("-")[0] for batch in share for name in batch} for share in shares]
    assert files == [{"0", "2", "4"}, {"1", "3", "5"}]
    assert ids(draw(shards(tmp_path, 1, 2), 5, 4)) == shares[1][4:]


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_other_processes_go_on_with_the_shards_of_those_before(tmp_path: Path, ranks: int) -> None:
    planned = [ids(draw(shards(tmp_path, rank, 2), 6)) for rank in range(2)]
    whole = [sorted(one + other) for one, other in zip(*planned, strict=True)]
    taken = [
        [
            [name for batch in window if batch.supervised for name in ids([batch])[0]]
            for window in islice(stream.windows(Position()), 6)
        ]
        for stream in (shards(tmp_path, rank, ranks) for rank in range(ranks))
    ]
    assert [sorted(name for steps in taken for name in steps[step]) for step in range(6)] == whole


@pytest.mark.parametrize(
    ("size", "accumulation", "ranks"), [(2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)]
)
def test_the_rows_of_a_step_do_not_depend_on_how_it_is_split(
    files: list[Path], size: int, accumulation: int, ranks: int
) -> None:
    whole = ids(draw(feed(files, size=4, shuffle_buffer=8), 6))
    streams = [
        feed(files, size=size, rank=rank, ranks=ranks, shuffle_buffer=8, accumulation=accumulation)
        for rank in range(ranks)
    ]
    windows = [list(islice(one.windows(Position()), 6)) for one in streams]
    assert all(
        len(window) == accumulation and len(batch.ids) == size
        for rank_windows in windows
        for window in rank_windows
        for batch in window
    )
    taken = [
        [name for rank_windows in windows for batch in ids(rank_windows[step]) for name in batch]
        for step in range(6)
    ]
    assert [sorted(step) for step in taken] == [sorted(step) for step in whole]


def test_steps_of_another_size_go_on_after_the_rows_that_were_read(files: list[Path]) -> None:
    rows = [
        name for batch in ids(draw(feed(files, size=1, shuffle_buffer=8), 24)) for name in batch
    ]
    first, second = (
        feed(files, size=2, accumulation=2, shuffle_buffer=8),
        feed(files, size=8, shuffle_buffer=8),
    )
    position = second.resumed(Position(step=2), first.cut(), first.drawn(Position(step=2)))
    taken = [
        name
        for window in islice(second.windows(position), 2)
        for batch in ids(window)
        for name in batch
    ]
    assert taken == rows[8:24]
    assert first.resumed(Position(step=2), first.cut(), {}) == Position(step=2)


def test_a_source_of_few_chunks_is_shared_by_rows(files: list[Path]) -> None:
    shares = [
        ids(draw(feed([files[0]], rank=rank, ranks=2, own_shards=True, weights=(1.0,)), 3))
        for rank in range(2)
    ]
    named = [{name for batch in share for name in batch} for share in shares]
    assert not named[0] & named[1]
    assert named[0] | named[1] <= {f"a{number}" for number in range(30)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_streamed_micro_batches_have_rows_of_one_loss_weight(files: list[Path], ranks: int) -> None:
    def drawn(losses: tuple[float, float]) -> list[list[Batch]]:
        streams = [
            feed(files, size=3, rank=rank, ranks=ranks, losses=losses) for rank in range(ranks)
        ]
        return [draw(stream, 5) for stream in streams]

    def names(feeds: list[list[Batch]]) -> list[str]:
        counted = (batch for batches in feeds for batch in batches if batch.questions)
        return sorted(name for batch in counted for name in batch.ids)

    apart = drawn((1.0, 2.5))
    assert len({len(batches) for batches in apart}) == 1
    for batch in (batch for batches in apart for batch in batches if batch.questions):
        (letter,) = {name.split(":")[1][0] for name in batch.ids}
        assert {"a": 1.0, "b": 2.5}[letter] == batch.loss_weight
    assert names(apart) == names(drawn((1.0, 1.0)))
