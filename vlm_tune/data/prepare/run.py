"""Prepares the examples of a recipe's data section on disk: in parallel, once, in a cache.

The cache key covers everything the examples depend on: the rows, the tokenizer, the templates, and
the recipe's data section. A second start memory-maps the files. An interrupted preparation resumes
from the chunks it finished.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import shutil
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from vlm_tune.config.data import DataSection, RowsSource, Source
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.prepare.dataset import Prepared
from vlm_tune.data.prepare.job import Job, PartName, plan_job
from vlm_tune.data.prepare.merge_shards import finish
from vlm_tune.data.prepare.mismatches import with_mismatches
from vlm_tune.data.prepare.worker import ShardMaker, ShardSummary
from vlm_tune.data.sources.base import Chunk, SourceReader
from vlm_tune.data.sources.few_shot import POOL_ROWS
from vlm_tune.data.sources.records import RowsReader
from vlm_tune.data.sources.registry import open_source, read_all
from vlm_tune.data.types import Conversation
from vlm_tune.errors import DataError, Interrupted
from vlm_tune.files import is_intact
from vlm_tune.resources import cache_folder, cache_room, check_cache, usable_cores

Progress = Callable[[int], None]
"""Called with the number of rows read so far."""


def prepare(
    data: DataSection,
    sources: Sequence[Source],
    processor: Processor,
    *,
    seed: int,
    part: PartName = "train",
    lenient: bool = False,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
    note: Callable[[str], None] | None = None,
) -> Prepared:
    """Prepares the rows of a part's sources, or opens them from the cache if they are intact there.

    Args:
        part: The part that the rows belong to.
        lenient: Accepts bad rows whatever the policy.
        progress: Called with the number of rows read so far.
        stop: Polled between shards; True stops the preparation.
        note: Called with a message if a cached folder was damaged.

    Raises:
        DataError: At the first unusable row with `on_bad_row: fail`, for more unusable rows than
            `max_bad_rows` (neither if `lenient`), and if no row is left.
        Interrupted: `stop` returned True; finished chunks stay in the cache.
        RecipeError: The cache cannot be written.
    """
    job = plan_job(data, sources, processor, seed=seed, part=part)
    if _has_shots(sources):
        single, alone = _without_shots(data, sources)
        options = {
            "seed": seed,
            "part": part,
            "lenient": lenient,
            "progress": progress,
            "stop": stop,
            "note": note,
        }
        job = _with_shots(job, prepare(single, alone, processor, **options))
    folder = cache_folder("prepared") / job.key
    prepared = _opened(folder, job)
    if prepared is None:
        check_cache(folder.parent)
        with _locked(folder), cache_room(folder.parent):
            # Another process may have prepared it meanwhile.
            prepared = Prepared.open(folder, job)
            if prepared is None:
                if note and folder.is_dir() and not is_intact(folder):
                    note(f"the prepared rows in {folder} were damaged and are prepared again")
                shutil.rmtree(folder, ignore_errors=True)
                partial = folder.with_suffix(".partial")
                _make_shards(job, partial, lenient=lenient, progress=progress, stop=stop)
                finish(partial, folder, job)
                prepared = Prepared(folder, job)
    prepared.check(lenient=lenient)
    return prepared


def find_prepared(
    data: DataSection, sources: Sequence[Source], processor: Processor, *, seed: int
) -> Prepared | None:
    """Opens the prepared rows of training sources; None where the cache does not have them intact.

    Raises `DataError` if a source or template can't be opened.
    """
    job = plan_job(data, sources, processor, seed=seed, part="train")
    if _has_shots(sources):
        alone = find_prepared(*_without_shots(data, sources), processor, seed=seed)
        if alone is None:
            return None
        job = _with_shots(job, alone)
    return _opened(cache_folder("prepared") / job.key, job)


def _has_shots(sources: Sequence[Source]) -> bool:
    return any(isinstance(source, RowsSource) and source.shots for source in sources)


def _without_shots(
    data: DataSection, sources: Sequence[Source]
) -> tuple[DataSection, list[Source]]:
    """The data section and sources of which few-shot examples are drawn."""
    alone = [
        source.model_copy(update={"shots": 0}) if isinstance(source, RowsSource) else source
        for source in sources
    ]
    return data.model_copy(update={"group": "none", "overlong": "drop"}), alone


def _with_shots(job: Job, alone: Prepared) -> Job:
    """The job with few-shot examples.

    They are drawn from the usable rows of the same part. The split is the one decided without them.
    """
    places = alone.places(alone.part)
    numbers = alone.column("number")
    readers = []
    for number, reader in enumerate(job.readers):
        if isinstance(reader, RowsReader):
            first = int(np.searchsorted(numbers, number))
            usable = places[numbers[places] == number][:POOL_ROWS] - first
            reader = reader.with_shots_from(tuple(usable.tolist()))
        readers.append(reader)
    return replace(job, readers=readers, parts=alone.column("part"))


def _opened(folder: Path, job: Job) -> Prepared | None:
    """Opens the cached rows under a shared lock; None if there are none.

    A read-only cache is read as well.
    """
    if not folder.is_dir():
        return None
    try:
        file = folder.with_suffix(".lock").open("rb")
    # Without a lock file no process can be writing.
    except OSError:
        return Prepared.open(folder, job)
    with file:
        fcntl.flock(file, fcntl.LOCK_SH)
        return Prepared.open(folder, job)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds an exclusive lock, so that one process prepares the folder while the others wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- shards ---


def _make_shards(
    job: Job,
    partial: Path,
    *,
    lenient: bool,
    progress: Progress | None,
    stop: Callable[[], bool] | None,
) -> None:
    """Writes the shards of every source to `partial`, and their names to shards.json."""
    partial.mkdir(parents=True, exist_ok=True)
    maker = ShardMaker(job.readers, job.processors, job.data, partial, scored=job.scored)
    fail = job.data.on_bad_row == "fail" and not lenient
    rows = 0
    listed = []
    for number, source in enumerate(job.sources):
        shards: list[str] = []
        source_rows = 0
        for shard in _work(
            maker, number, _chunks(job.readers[number], source.limit), job.data.workers
        ):
            if shard.bad and (fail or (shard.bad[2] == "overlong" and not lenient)):
                name, row, kind, message = shard.bad
                advice = " (overlong: drop, split or trim)" if kind == "overlong" else ""
                raise DataError(message + advice, source=name, row=row, kind=kind)
            shards.append(shard.folder.name)
            source_rows = source_rows + shard.rows
            rows = rows + shard.rows
            if progress:
                progress(rows)
            if stop and stop():
                raise Interrupted(
                    f"stopped while preparing, after {rows:,} rows; they are reused at the next "
                    "start"
                )
            if source.limit is not None and source_rows >= source.limit:
                break
        listed.append(shards)
    (partial / "shards.json").write_text(json.dumps(listed))


def _chunks(reader: SourceReader, limit: int | None) -> Iterator[Chunk]:
    """Yields a source's chunks, up to those that hold about twice `limit` rows."""
    promised = 0
    for chunk in reader.chunks():
        yield chunk
        promised += chunk.rows
        if limit is not None and promised >= 2 * limit:
            return


_maker: ShardMaker | None = None


def _start_worker(maker: ShardMaker) -> None:
    global _maker
    # Ctrl-C is handled by the main process, which lets the current chunks finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _maker = maker


def _in_worker(source: int, chunk: Chunk) -> ShardSummary:
    assert _maker is not None
    return _maker(source, chunk)


def _work(
    maker: ShardMaker, source: int, chunks: Iterator[Chunk], workers: int | None
) -> Iterator[ShardSummary]:
    """Yields the shards of `chunks` in order; several processes make them if there are several."""
    first = list(islice(chunks, 2))
    chunks = chain(first, chunks)
    workers = usable_cores() if workers is None else workers
    if len(first) < 2 or workers < 2:
        for chunk in chunks:
            yield maker(source, chunk)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(maker,)
    )
    waiting: deque[tuple[Chunk, Future[ShardSummary]]] = deque()
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_in_worker, source, chunk)))
            # The number of chunks ahead is bounded, so that neither chunks nor results pile up.
            if len(waiting) > 2 * workers:
                yield waiting.popleft()[1].result()
        while waiting:
            yield waiting[0][1].result()
            waiting.popleft()
    except BrokenProcessPool:
        chunk = waiting[0][0]
        last = chunk.first_row + chunk.rows - 1
        raise DataError(
            f"a process that prepared rows {chunk.first_row} to {last} or after was killed (out "
            "of memory?); fewer data.workers need less; finished work is kept",
            source=maker.readers[source].name,
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


# --- conversations ---


def conversations(
    data: DataSection, sources: Sequence[Source], seed: int
) -> Iterator[Conversation]:
    """Yields the usable conversations of sources in order.

    Raises `DataError` at the first bad row with `on_bad_row: fail`, and for more bad rows than
    `max_bad_rows`.
    """
    bad = 0
    for source in sources:
        for row in islice(read_all([open_source(source, seed=seed)]), source.limit):
            if isinstance(row, Conversation):
                yield row
                continue
            if data.on_bad_row == "fail":
                raise row
            bad += 1
            if bad > data.max_bad_rows:
                raise DataError(
                    f"more than {data.max_bad_rows} bad rows (data.max_bad_rows); the last: {row}"
                )


def scratch_texts(recipe: Recipe) -> list[Conversation]:
    """The training conversations of all stages if the tokenizer is trained on them, else none."""
    if not recipe.scratch:
        return []
    return [
        row
        for _, stage in recipe.resolved_stages()
        for row in conversations(stage.data, stage.data.train, stage.seed)
    ]


def read_part(
    data: DataSection, part: PartName, processor: Processor, seed: int
) -> list[Conversation]:
    """Reads the usable conversations of `validation` or `test`.

    These are the rows of the part's own sources, and those that `data.split` holds out for it.
    Raises `DataError` as `prepare`.
    """
    return part_conversations(prepared_parts(data, part, processor, seed), part)


def part_conversations(parts: Sequence[Prepared], part: PartName) -> list[Conversation]:
    """Reads the usable conversations of a part from the result of `prepared_parts`.

    Rows of the form `match` are followed by ones that do not match.
    """
    rows = [row for prepared in parts for row in prepared.conversations(prepared.places(part))]
    return with_mismatches(rows)


def prepared_parts(
    data: DataSection, part: PartName, processor: Processor, seed: int, **options: Any
) -> list[Prepared]:
    """Prepares the sources that hold a part's rows.

    These are its own sources, and those of `train` if `data.split` holds rows out for the part.
    `options` are passed to `prepare`.
    """
    sources: list[tuple[PartName, Sequence[Source]]] = [(part, getattr(data, part))]
    if part != "train" and data.split is not None and getattr(data.split, part):
        sources.append(("train", data.train))
    return [
        prepare(data, each, processor, seed=seed, part=name, **options)
        for name, each in sources
        if each
    ]
