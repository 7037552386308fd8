"""The training loop's source of batches: the `Feed` protocol and its form for prepared rows.

The feed of streamed rows is in `streaming`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from vlm_tune.compat import worker_processes
from vlm_tune.config.data import Augment
from vlm_tune.data.batch import Batch
from vlm_tune.data.batching.augmented import Attempts, Augmented
from vlm_tune.data.batching.collate import Fetch, collate
from vlm_tune.data.batching.corruption import Corruption
from vlm_tune.data.batching.references import StoredReferences
from vlm_tune.data.batching.sampler import Epoch, Plan, Rows
from vlm_tune.data.packing import pack_layout, with_mismatched
from vlm_tune.data.prepare.dataset import Group, Prepared
from vlm_tune.data.types import IGNORE_INDEX, Example, InputSpec
from vlm_tune.errors import DataError
from vlm_tune.quoting import name_list, reason_of

if TYPE_CHECKING:
    pass


PRELOADED = ("torch", "pyarrow", "vlm_tune.data.batching.loader")
"""Modules that the server of `forkserver` imports once for all loader processes."""


@dataclass(frozen=True)
class Position:
    """A position in the data: an epoch and the optimizer steps taken under its current plan.

    If the epoch began under another plan, `before` holds how often each of its units was drawn
    until this plan began. A stream has one endless epoch, and `rows` is the number of rows read
    until then.
    """

    epoch: int = 0
    step: int = 0
    before: np.ndarray | None = None
    rows: int = 0


class Feed(Protocol):
    """The micro-batches of every optimizer step, from any position of any epoch.

    The rows of a step do not depend on the number of processes: they are sharded over the ranks.
    """

    def cut(self) -> dict[str, Any]:
        """Everything that the order of rows and the rows of each step depend on, as JSON.

        Feeds with equal cuts take the same steps.
        """
        ...

    def steps(self, position: Position) -> int | None:
        """The number of steps of the position's epoch under this plan; None if it is endless."""
        ...

    def share(self, position: Position) -> float:
        """The fraction of its epoch drawn before the position; 0 for an endless epoch."""
        ...

    def drawn(self, position: Position) -> dict[str, np.ndarray]:
        """Arrays that a checkpoint stores for `resumed`, beside the position."""
        ...

    def resumed(
        self, position: Position, cut: dict[str, Any], drawn: Mapping[str, np.ndarray]
    ) -> Position:
        """Maps a checkpoint's position to this plan.

        It is unchanged if the cuts are equal; else it continues with what is left of the epoch.

        Args:
            position: The position stored in the checkpoint.
            cut: The checkpoint's `cut`.
            drawn: The checkpoint's `drawn`.
        """
        ...

    def windows(self, position: Position) -> Iterator[list[Batch]]:
        """Yields this process's micro-batches of each step of an epoch, from the position on."""
        ...


Place = tuple[int, int]
"""A micro-batch: the step in its epoch, and its index in that step."""


@dataclass(frozen=True)
class Loading:
    """The micro-batch that the feed waits for: its index `place` in the list `numbers`.

    `pids` are the process ids of the workers.
    """

    position: Position
    numbers: list[Place]
    place: int
    pids: list[int]


class PreparedFeed:
    """Batches of prepared rows; `fetch` returns features if `cached`, else pixels.

    `augment` configures random changes of the pixels. `workers` processes, if any, make batches
    ahead, started by the method `start` of multiprocessing; a thread puts them into pinned memory
    if `pinned`. With `mismatches` each prompt of preferences also has an answer of the unit before
    its own; with `two_views` each image is augmented twice; `corruption` masks spans of answers.

    Attributes:
        references: The reference model's log-probabilities of the units' answers, if stored.
    """

    def __init__(
        self,
        prepared: Prepared,
        plan: Plan,
        spec: InputSpec,
        fetch: Fetch,
        *,
        cached: bool = False,
        augment: Augment | None = None,
        rank: int = 0,
        ranks: int | None = None,
        workers: int = 0,
        start: Literal["fork", "forkserver"] = "fork",
        pinned: bool = False,
        mismatches: bool = False,
        two_views: bool = False,
        corruption: Corruption | None = None,
    ) -> None:
        self.mismatches = mismatches
        self.two_views = two_views
        self.corruption = corruption
        self.references: StoredReferences | None = None
        self.ranks = ranks or plan.sizes.ranks
        self.prepared = prepared
        self.plan = plan
        self.spec = spec
        self.fetch = fetch
        self.cached = cached
        self.augment = augment
        self.rank = rank
        self.workers = workers
        self.start: Literal["fork", "forkserver"] = start
        self.pinned = pinned
        self.loading: Loading | None = None

    def cut(self) -> dict[str, Any]:
        """Everything that the order of rows and the rows of each step depend on."""
        return self.plan.cut(self.prepared)

    def steps(self, position: Position) -> int:
        """The number of steps of the position's epoch."""
        return len(self._epoch(position))

    def share(self, position: Position) -> float:
        """The fraction of its epoch's units drawn before the position."""
        epoch = self._epoch(position)
        whole = sum(self.plan.counts)
        return (whole - len(epoch.units) + epoch.units_before(position.step)) / whole

    def drawn(self, position: Position) -> dict[str, np.ndarray]:
        """How often each unit was drawn in the position's epoch: int64[units], ordered by source.

        `drawn` counts all draws, `before` those under earlier plans (absent if there were none).
        """
        before = (
            np.zeros(len(self.prepared), dtype=np.int64)
            if position.before is None
            else position.before
        )
        drawn = before + np.bincount(
            self._epoch(position).drawn(position.step), minlength=len(before)
        )
        order = np.concatenate(self.plan.by_source)
        return {"drawn": drawn[order]} | (
            {} if position.before is None else {"before": before[order]}
        )

    def resumed(
        self, position: Position, cut: dict[str, Any], drawn: Mapping[str, np.ndarray]
    ) -> Position:
        """Maps a checkpoint's position to this plan; draws of sources that are gone are dropped."""
        if cut == self.cut():
            if "before" not in drawn:
                return position
            before = np.zeros(len(self.prepared), dtype=np.int64)
            before[np.concatenate(self.plan.by_source)] = drawn["before"]
            return replace(position, before=before)
        before = np.zeros(len(self.prepared), dtype=np.int64)
        sizes = [size for _, size in cut["sources"]]
        earlier = [
            (name, part)
            for (name, _), part in zip(
                cut["sources"], np.split(drawn["drawn"], np.cumsum(sizes)[:-1]), strict=True
            )
        ]
        for (name, _), units in zip(self.cut()["sources"], self.plan.by_source, strict=True):
            place = next((place for place, (other, _) in enumerate(earlier) if other == name), None)
            if place is not None:
                _, part = earlier.pop(place)
                # A unit is identified by its index in its source: rows may have been added or cut
                # off at the end.
                before[units[: len(part)]] = part[: len(units)]
        return Position(position.epoch, before=before if before.any() else None)

    def _epoch(self, position: Position) -> Epoch:
        return self.plan.epoch(position.epoch, position.before)

    def batch(self, position: Position, place: Place) -> Batch:
        """One micro-batch of this process; if no row is left for it, a row with ignored labels."""
        epoch = self._epoch(position)
        step, number = place
        groups, attempts = self._units(self._rows(position, place), position.epoch)
        if not groups:
            row = next(share for share in epoch.shares(step, self.ranks)[number] if len(share))
            ((unit, *_), *_) = epoch.units_of(row[:1])
            groups = [[blank(self.unit(unit))]]
        batch = self._collate(groups, position.epoch, attempts)
        kind = self.plan.kinds[epoch.kind(step, number, self.ranks)]
        batch.task, batch.loss_weight, batch.objective = kind
        return batch

    def _units(self, rows: Rows, epoch: int) -> tuple[list[list[Group]], Attempts]:
        """The units of rows in an epoch, and the draws of their augmentation."""
        return [[self.unit(unit) for unit in row] for row in rows], {}

    def unit(self, number: int) -> Group:
        """The examples of a unit as they are trained on."""
        return self.completed(number, self.prepared.unit(number))

    def completed(self, number: int, unit: Group) -> Group:
        """A unit's examples with what the objective adds to them."""
        if self.mismatches:
            other = self.prepared.unit(number - 1 if number else len(self.prepared) - 1)
            unit = with_mismatched(unit, other, self.spec.layout)
        return unit if self.references is None else self.references.attached(number, unit)

    def _rows(self, position: Position, place: Place) -> Rows:
        """The rows of a micro-batch of this process."""
        return self._epoch(position).rows(*place, self.rank, self.ranks)

    def _collate(self, rows: list[list[Group]], epoch: int, attempts: Attempts) -> Batch:
        if self.corruption is not None:
            rows = [[self.corruption.of_unit(unit, epoch) for unit in row] for row in rows]
        joined_rows = [joined(row, self.spec.layout) for row in rows]
        examples = [example for row in joined_rows for example in row]
        if self.augment is None:
            return collate(examples, self.spec, fetch=self.fetch, cached=self.cached)
        owners = [
            row[0][0].id
            for row, row_examples in zip(rows, joined_rows, strict=True)
            for _ in row_examples
        ]
        changed = Augmented(self.fetch, self.augment, self.plan.seed, epoch, attempts)
        other = replace(changed, view=1) if self.two_views else None
        return collate(examples, self.spec, fetch_for=changed, fetch_view=other, owners=owners)

    def windows(self, position: Position) -> Iterator[list[Batch]]:
        """Yields this process's micro-batches of each step; workers, if any, prefetch them."""
        if not self.workers:
            epoch = self._epoch(position)
            for step in range(position.step, len(epoch)):
                numbers = range(len(epoch.shares(step, self.ranks)))
                yield [self.batch(position, (step, number)) for number in numbers]
            return
        places = self._epoch(position).places(self.ranks, position.step)
        batches = _ahead(self, position, places)
        for _, numbers in groupby(places, key=lambda place: place[0]):
            yield [next(batches) for _ in numbers]

    def rows_of(self, position: Position, place: Place) -> list[str]:
        """The sample ids of a micro-batch of this process."""
        return [
            unit[0].id
            for row in self._rows(position, place)
            for unit in map(self.prepared.unit, row)
        ]

    def killed_worker(self, error: RuntimeError) -> DataError | None:
        """An error that names the rows a killed loader worker was processing.

        Returns None if `error` has another cause.
        """
        # torch raises a plain `RuntimeError` for it.
        if self.loading is None or "DataLoader worker" not in str(error):
            return None
        position = self.loading.position
        numbers = self.loading.numbers
        place = self.loading.place
        pids = self.loading.pids
        match = re.search(r"pid\D*(\d+)", str(error))
        worker = (
            pids.index(int(match[1]))
            if match and int(match[1]) in pids
            else place % max(len(pids), 1)
        )
        # Workers take batches in turn: this one was at the first of its batches still to come.
        turns = range(place, len(numbers)) if pids else range(0)
        number = next(
            (numbers[turn] for turn in turns if turn % len(pids) == worker), numbers[place]
        )
        return DataError(
            f"a loader process was killed ({reason_of(error)}) at step {number[0] + 1} of epoch "
            f"{position.epoch + 1} or soon after: "
            f"{name_list(self.rows_of(position, number), 8)}. train.loader_workers: 0 shows "
            "whether a row does it; if memory ran out, fewer workers need less",
            source="data.train",
            kind="worker",
        )


@dataclass(frozen=True)
class _Numbered:
    """A feed's micro-batches by number, as torch's DataLoader asks its workers for them."""

    feed: PreparedFeed
    position: Position
    numbers: list[Place]

    def __getitem__(self, index: int) -> Batch:
        return self.feed.batch(self.position, self.numbers[index])


def _begin_worker(number: int) -> None:
    """Leaves signals to the training process, and ends this one when that has ended.

    Ctrl-C is sent to the workers as well. torch's own watch compares the id of the parent, which is
    the server's here: workers would outlive a training process that was killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _end_with_parent() -> None:
    """Waits until the process that asked for this one has ended, then ends this one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Context in which SIGINT and SIGTERM wait, also in the processes that start meanwhile.

    Sent to the group of processes they would end the server as it starts, or a worker before it
    ignores them, and not stop the run in order.
    """
    # Starting it unblocks the signals again, and starting the server starts it.
    resource_tracker.ensure_running()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _ahead(feed: PreparedFeed, position: Position, numbers: list[Place]) -> Iterator[Batch]:
    """Yields batches prefetched by worker processes."""
    import torch
    from torch.utils.data import DataLoader

    # Forked workers share the rows that are mapped into memory, and may be forked after CUDA has
    # been initialised, since they make no tensor on a GPU. Others open the files again.
    context = multiprocessing.get_context(feed.start)
    clean = feed.start == "forkserver"
    if clean:
        context.set_forkserver_preload([*PRELOADED, type(feed.fetch).__module__])
    # A batch is a function of its place, so the workers need no sampler and no state, and draw
    # nothing from the random generators of the training.
    loader: Any = DataLoader(
        _Numbered(feed, position, numbers),  # type: ignore[arg-type]
        batch_size=None,
        sampler=range(len(numbers)),
        num_workers=min(feed.workers, len(numbers)),  # torch starts idle ones too
        prefetch_factor=2,
        generator=torch.Generator(),
        pin_memory=feed.pinned,
        worker_init_fn=_begin_worker if clean else None,
        multiprocessing_context=context,
    )
    # A worker may be killed before all of them have started.
    feed.loading = Loading(position, numbers, 0, [])
    # A forked worker has the handlers of the training process, which only note signals.
    with _signals_wait() if clean else contextlib.nullcontext():
        batches = iter(loader)
    for place in range(len(numbers)):
        feed.loading = Loading(position, numbers, place, worker_processes(batches))
        yield next(batches)


def joined(units: list[Group], layout: str) -> list[Example]:
    """The examples of one row: those of a single unit unchanged, several units packed into one."""
    return (
        units[0]
        if len(units) == 1
        else [pack_layout([example for unit in units for example in unit], layout)]
    )


def blank(unit: Group) -> Group:
    """The unit with all labels ignored and no questions counted."""
    return [
        replace(
            example,
            labels=np.full_like(example.labels, IGNORE_INDEX),
            questions=0,
            answers=None if example.answers is None else np.full_like(example.answers, -1),
            reference=None,
        )
        for example in unit
    ]
