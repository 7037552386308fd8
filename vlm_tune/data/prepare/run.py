"""From a recipe's data section to prepared examples on disk: read in parallel, once, and kept.

The key is everything the examples depend on: the rows, the tokenizer, the templates, and the recipe's data section. A
second start maps the files; a preparation that was stopped goes on from the chunks it finished.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
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
from vlm_tune.data.prepare.worker import ShardMaker, ShardSummary
from vlm_tune.data.sources.base import Chunk, SourceReader
from vlm_tune.data.sources.few_shot import POOL_ROWS
from vlm_tune.data.sources.records import RowsReader
from vlm_tune.data.sources.registry import open_source, read_all
from vlm_tune.data.types import Conversation
from vlm_tune.errors import DataError, Interrupted
from vlm_tune.files import is_intact
from vlm_tune.resources import cache_folder, cache_room, check_cache

Progress = Callable[[int], None]
"""Is told the number of rows read so far."""


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
    """The prepared rows of `sources`, which belong to a part, from the cache where they are there and intact.

    `note` is told where a cached folder was damaged.

    Raises:
        DataError: at the first row that can't be used with `on_bad_row: fail` (not if `lenient`), for more of them than
            `max_bad_rows`, and if no row is left.
        Interrupted: when `stop` says so; what is done is kept.
        RecipeError: the cache can't be written.
    """
    job = plan_job(data, sources, processor, seed=seed, part=part)
    if any(isinstance(source, RowsSource) and source.shots for source in sources):
        alone = [
            source.model_copy(update={"shots": 0}) if isinstance(source, RowsSource) else source
            for source in sources
        ]
        single = data.model_copy(update={"group": "none", "overlong": "drop"})
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
            # Another process may have made it meanwhile.
            prepared = Prepared.open(folder, job)
            if prepared is None:
                if note and folder.is_dir() and not is_intact(folder):
                    note(f"the prepared rows in {folder} were damaged: they are prepared anew")
                shutil.rmtree(folder, ignore_errors=True)
                partial = folder.with_suffix(".partial")
                _make_shards(job, partial, lenient=lenient, progress=progress, stop=stop)
                finish(partial, folder, job)
                prepared = Prepared(folder, job)
    prepared.check(lenient=lenient)
    return prepared


def _with_shots(job: Job, alone: Prepared) -> Job:
    """The job, its worked examples drawn from rows of the same part that can be used, and its split settled without them."""
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
    """What is in the cache, opened beside others who read it; a cache that can't be written is read too."""
    if not folder.is_dir():
        return None
    try:
        file = folder.with_suffix(".lock").open("rb")
    except OSError:  # nobody can be writing where there is no lock
        return Prepared.open(folder, job)
    with file:
        fcntl.flock(file, fcntl.LOCK_SH)
        return Prepared.open(folder, job)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time makes the folder: the others wait, and find the work done."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- the work --------------------------------------------------------------------------------------------------------


def _make_shards(
    job: Job,
    partial: Path,
    *,
    lenient: bool,
    progress: Progress | None,
    stop: Callable[[], bool] | None,
) -> None:
    """Fills `partial` with the shards of every source, and lists them in shards.json."""
    partial.mkdir(parents=True, exist_ok=True)
    maker = ShardMaker(job.readers, job.processors, job.data, partial, scored=job.scored)
    fail = job.data.on_bad_row == "fail" and not lenient
    rows = 0
    listed = []
    for number, source in enumerate(job.sources):
        shards: list[str] = []
        own = 0
        for shard in _work(
            maker, number, _chunks(job.readers[number], source.limit), job.data.workers
        ):
            if shard.bad and (fail or (shard.bad[2] == "overlong" and not lenient)):
                name, row, kind, message = shard.bad
                advice = " (overlong: drop, split or trim)" if kind == "overlong" else ""
                raise DataError(message + advice, source=name, row=row, kind=kind)
            shards.append(shard.folder.name)
            own = own + shard.rows
            rows = rows + shard.rows
            if progress:
                progress(rows)
            if stop and stop():
                raise Interrupted(
                    f"stopped while preparing, after {rows:,} rows; they are kept for the next start"
                )
            if source.limit is not None and own >= source.limit:
                break
        listed.append(shards)
    (partial / "shards.json").write_text(json.dumps(listed))


def _chunks(reader: SourceReader, limit: int | None) -> Iterator[Chunk]:
    """A source's chunks, few more than hold `limit` rows."""
    promised = 0
    for chunk in reader.chunks():
        yield chunk
        promised += chunk.rows
        if limit is not None and promised >= 2 * limit:
            return


_maker: ShardMaker | None = None


def _start_worker(maker: ShardMaker) -> None:
    global _maker
    # Ctrl-C is the main process's to handle: it lets the chunks at work be finished.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _maker = maker


def _in_worker(source: int, chunk: Chunk) -> ShardSummary:
    assert _maker is not None
    return _maker(source, chunk)


def _work(
    maker: ShardMaker, source: int, chunks: Iterator[Chunk], workers: int | None
) -> Iterator[ShardSummary]:
    """The shards of `chunks` in order, made by several processes where there is more than one chunk."""
    first = list(islice(chunks, 2))
    chunks = chain(first, chunks)
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
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
            # A bounded number ahead, so that neither chunks nor results pile up.
            if len(waiting) > 2 * workers:
                yield waiting.popleft()[1].result()
        while waiting:
            yield waiting[0][1].result()
            waiting.popleft()
    except BrokenProcessPool:
        chunk = waiting[0][0]
        last = chunk.first_row + chunk.rows - 1
        raise DataError(
            f"a process that prepared rows {chunk.first_row} to {last} or after was killed (out of memory?); "
            "fewer data.workers need less. What is done is kept",
            source=maker.readers[source].name,
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


# --- conversations ---------------------------------------------------------------------------------------------------


def conversations(
    data: DataSection, sources: Sequence[Source], seed: int
) -> Iterator[Conversation]:
    """The good conversations of sources in order, one by one; bad rows as the policy tells.

    Raises `DataError` at the first bad row with `on_bad_row: fail`, and for more of them than `max_bad_rows`.
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
    """The training conversations of every stage, where the recipe's tokenizer is trained on them; else none."""
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
    """The usable conversations of `validation` or `test`: its own sources' rows, and those that `data.split` holds out for it.

    Raises `DataError` as `prepare`.
    """
    return part_conversations(prepared_parts(data, part, processor, seed), part)


def part_conversations(parts: Sequence[Prepared], part: PartName) -> list[Conversation]:
    """The usable conversations of a part in what holds its rows."""
    return [row for prepared in parts for row in prepared.conversations(prepared.places(part))]


def prepared_parts(
    data: DataSection, part: PartName, processor: Processor, seed: int, **options: Any
) -> list[Prepared]:
    """What holds the rows of a part: of its own sources, and of those it is held out of; `options` are `prepare`'s."""
    sources: list[tuple[PartName, Sequence[Source]]] = [(part, getattr(data, part))]
    if part != "train" and data.split is not None and getattr(data.split, part):
        sources.append(("train", data.train))
    return [
        prepare(data, each, processor, seed=seed, part=name, **options)
        for name, each in sources
        if each
    ]
