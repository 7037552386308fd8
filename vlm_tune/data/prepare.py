"""From a recipe's data section to prepared examples on disk: read in parallel, once, and kept.

The key is everything the examples depend on: the rows, the tokenizer, the templates, and the recipe's data section. A
second start maps the files; a preparation that was stopped goes on from the chunks it finished.
"""

from __future__ import annotations

import fcntl
import hashlib
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
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from vlm_tune.config import DataSection, Recipe, Source
from vlm_tune.data.finish import finish
from vlm_tune.data.prepared import Prepared
from vlm_tune.data.processor import Processor
from vlm_tune.data.shards import ShardMaker, ShardSummary
from vlm_tune.data.sources.registry import open_source, read_all
from vlm_tune.data.sources.rows import Chunk, SourceReader
from vlm_tune.data.types import Conversation
from vlm_tune.errors import DataError, Interrupted
from vlm_tune.resources import cache_folder

FORMAT = 2
"""Counts up when what is prepared from the same input changes."""

KEY_PARTS = {"max_length", "overlong", "clean", "group", "row_length", "split"}
"""The parts of the data section that prepared examples depend on; sources and templates are keyed apart."""

Progress = Callable[[int], None]
"""Is told the number of rows read so far."""


@dataclass(frozen=True)
class Job:
    """What is to be prepared: a part's sources, and for each a processor with its own template and system text."""

    data: DataSection
    sources: Sequence[Source]
    readers: Sequence[SourceReader]
    processors: Sequence[Processor]
    seed: int

    @property
    def key(self) -> str:
        """Names the folder of the result."""
        kept = self.data.model_dump(mode="json", include=KEY_PARTS)
        parts = [f"{FORMAT} {self.seed} {json.dumps(kept, sort_keys=True)}"]
        for source, reader, processor in zip(self.sources, self.readers, self.processors, strict=True):
            parts += [source.model_dump_json(exclude={"weight", "count"}), reader.fingerprint(), processor.fingerprint()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]


def plan_job(data: DataSection, sources: Sequence[Source], processor: Processor, seed: int) -> Job:
    """A job for a part of the data section. Raises `DataError` for a source or template that can't be opened."""
    readers = [open_source(source, seed=seed) for source in sources]
    bounded = replace(processor, spec=replace(processor.spec, max_length=data.max_length))
    processors = [bounded.variant(source.template, source.system) for source in sources]
    return Job(data, sources, readers, processors, seed)


def prepare(
    data: DataSection,
    sources: Sequence[Source],
    processor: Processor,
    *,
    seed: int,
    lenient: bool = False,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> Prepared:
    """The prepared examples of `sources`, from the cache where they are there.

    Raises `DataError` at the first row that can't be used with `on_bad_row: fail` (not if `lenient`), for more of them
    than `max_bad_rows`, and if nothing is left to train on; `Interrupted` when `stop` says so, keeping what is done.
    """
    job = plan_job(data, sources, processor, seed)
    folder = cache_folder("prepared") / job.key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        found = Prepared.open(folder, data, sources, processor.spec.layout)
        if found is None:
            shutil.rmtree(folder, ignore_errors=True)
            partial = folder.with_suffix(".partial")
            _make_shards(job, partial, lenient=lenient, progress=progress, stop=stop)
            finish(partial, folder, data, sources, processor.spec.layout, seed)
            found = Prepared.open(folder, data, sources, processor.spec.layout)
            assert found is not None
    found.check(lenient=lenient)
    return found


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time: the others wait, and find the work done."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- the work --------------------------------------------------------------------------------------------------------


def _make_shards(job: Job, partial: Path, *, lenient: bool, progress: Progress | None, stop: Callable[[], bool] | None) -> None:
    """Fills `partial` with the shards of every source, and lists them in shards.json."""
    partial.mkdir(parents=True, exist_ok=True)
    maker = ShardMaker(job.readers, job.processors, job.data, partial)
    fail = job.data.on_bad_row == "fail" and not lenient
    rows, listed = 0, []
    for number, source in enumerate(job.sources):
        shards: list[str] = []
        own = 0
        for shard in _work(maker, number, _chunks(job.readers[number], source.limit), job.data.workers):
            if shard.bad and (fail or (shard.bad[2] == "overlong" and not lenient)):
                name, row, kind, message = shard.bad
                advice = " (overlong: drop, split or trim)" if kind == "overlong" else ""
                raise DataError(message + advice, source=name, row=row, kind=kind)
            shards.append(shard.folder.name)
            own, rows = own + shard.rows, rows + shard.rows
            if progress:
                progress(rows)
            if stop and stop():
                raise Interrupted(f"stopped while preparing, after {rows:,} rows; they are kept for the next start")
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


def _work(maker: ShardMaker, source: int, chunks: Iterator[Chunk], workers: int | None) -> Iterator[ShardSummary]:
    """The shards of `chunks` in order, made by several processes where there is more than one chunk."""
    first = list(islice(chunks, 2))
    chunks = chain(first, chunks)
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if len(first) < 2 or workers < 2:
        for chunk in chunks:
            yield maker(source, chunk)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(maker,))
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


def conversations(data: DataSection, sources: Sequence[Source], seed: int) -> Iterator[Conversation]:
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
                raise DataError(f"more than {data.max_bad_rows} bad rows (data.max_bad_rows); the last: {row}")


def scratch_texts(recipe: Recipe) -> list[Conversation]:
    """The training conversations of every stage, where the recipe's tokenizer is trained on them; else none."""
    if not recipe.scratch:
        return []
    return [row for _, stage in recipe.resolved_stages() for row in conversations(stage.data, stage.data.train, stage.seed)]


def read_part(data: DataSection, part: Any, processor: Processor, seed: int, train: Prepared | None = None) -> list[Conversation]:
    """The conversations of `validation` or `test`: its own sources' rows, and those that `data.split` holds out for it.

    `train` are the prepared training rows, where they are at hand.
    """
    own = list(conversations(data, getattr(data, part), seed))
    if data.split is None or not getattr(data.split, part):
        return own
    held = (train or prepare(data, data.train, processor, seed=seed)).held_out(part)
    for number, source in enumerate(data.train):
        for place, row in enumerate(islice(read_all([open_source(source, seed=seed)]), source.limit)):
            if place in held[number] and isinstance(row, Conversation):
                own.append(row)
    return own
