"""What the training loop takes its batches from: prepared rows by a plan, or rows that are read as they come."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vlm_tune.config.data import Augment
from vlm_tune.data.batching.collate import Fetch, collate
from vlm_tune.data.batching.packing import pack_layout
from vlm_tune.data.batching.sampler import Epoch, Plan, Rows
from vlm_tune.data.images.decode import augment_pixels
from vlm_tune.data.prepare.dataset import Group, Prepared
from vlm_tune.data.types import IGNORE_INDEX, Batch, Example, InputSpec, Media
from vlm_tune.errors import DataError
from vlm_tune.quoting import reason_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Position:
    """A place in the data: optimizer steps of an epoch, counted from where its present plan began.

    Where an epoch was begun under another plan, `before` says how often each of its units was drawn by then. A stream has
    one epoch without an end, of which `rows` were read by then.
    """

    epoch: int = 0
    step: int = 0
    before: np.ndarray | None = None
    rows: int = 0


class Feed(Protocol):
    """The micro-batches of every optimizer step, from any place of any epoch.

    Which rows a step takes does not depend on how many processes there are: each takes its share of them.
    """

    def cut(self) -> dict[str, Any]:
        """What the order of rows and the rows of each step depend on, as JSON: equal cuts give equal steps."""
        ...

    def steps(self, position: Position) -> int | None:
        """How many steps the position's epoch has under the present plan; None for an epoch without an end."""
        ...

    def share(self, position: Position) -> float:
        """What share of its epoch was drawn before the position; 0 for an epoch without an end."""
        ...

    def drawn(self, position: Position) -> dict[str, np.ndarray]:
        """What `resumed` needs beside a position, as arrays to keep in a checkpoint."""
        ...

    def resumed(
        self, position: Position, cut: dict[str, Any], drawn: Mapping[str, np.ndarray]
    ) -> Position:
        """A checkpoint's position in the present plan: the same under an equal cut, else one that goes on with what is left."""
        ...

    def windows(self, position: Position) -> Iterator[list[Batch]]:
        """This process's micro-batches of each step of an epoch, from the position on."""
        ...


Place = tuple[int, int]
"""A micro-batch: the step of its epoch, and its number in that step."""


@dataclass(frozen=True)
class Loading:
    """Which micro-batch of an epoch the worker processes are waited for, as a place in `numbers`."""

    position: Position
    numbers: list[Place]
    place: int
    pids: list[int]


class PreparedFeed:
    """Batches of prepared rows; `fetch` gives features if `cached`, else pixels, which `augment` changes."""

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
    ) -> None:
        self.ranks = ranks or plan.sizes.ranks
        self.prepared = prepared
        self.plan = plan
        self.spec = spec
        self.fetch = fetch
        self.cached = cached
        self.augment = augment
        self.rank = rank
        self.workers = workers
        self.loading: Loading | None = None

    def cut(self) -> dict[str, Any]:
        """What the order of rows and the rows of each step depend on."""
        return self.plan.cut(self.prepared)

    def steps(self, position: Position) -> int:
        """How many steps the position's epoch has."""
        return len(self._epoch(position))

    def share(self, position: Position) -> float:
        """What share of its epoch's units was drawn before the position."""
        epoch = self._epoch(position)
        whole = sum(self.plan.counts)
        return (whole - len(epoch.units) + epoch.units_before(position.step)) / whole

    def drawn(self, position: Position) -> dict[str, np.ndarray]:
        """How often each unit was drawn in the position's epoch, in all and before the present plan, source by source."""
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
        """A checkpoint's position in the present plan; what was drawn of sources that are there no longer is forgotten."""
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
                # A unit is known by its place in its source: rows may have been added to its end, or cut off.
                before[units[: len(part)]] = part[: len(units)]
        return Position(position.epoch, before=before if before.any() else None)

    def _epoch(self, position: Position) -> Epoch:
        return self.plan.epoch(position.epoch, position.before)

    def batch(self, position: Position, place: Place) -> Batch:
        """One micro-batch of this process; where there is no row for it, a row whose labels are ignored."""
        rows = self._rows(position, place)
        if not rows:
            epoch = self._epoch(position)
            step, number = place
            row = next(share for share in epoch.shares(step, self.ranks)[number] if len(share))
            ((unit, *_), *_) = epoch.units_of(row[:1])
            return self._collate([[blank(self.prepared.unit(unit))]], position.epoch)
        return self._collate(
            [[self.prepared.unit(unit) for unit in row] for row in rows], position.epoch
        )

    def _rows(self, position: Position, place: Place) -> Rows:
        """The rows of a micro-batch of this process."""
        return self._epoch(position).rows(*place, self.rank, self.ranks)

    def _collate(self, rows: list[list[Group]], epoch: int) -> Batch:
        made = [joined(row, self.spec.layout) for row in rows]
        examples = [example for row in made for example in row]
        if self.augment is None:
            return collate(examples, self.spec, fetch=self.fetch, cached=self.cached)
        owners = [row[0][0].id for row, found in zip(rows, made, strict=True) for _ in found]
        return collate(
            examples,
            self.spec,
            fetch_for=Augmented(self.fetch, self.augment, self.plan.seed, epoch),
            owners=owners,
        )

    def windows(self, position: Position) -> Iterator[list[Batch]]:
        """This process's micro-batches of each step from the position; made ahead by worker processes where there are any."""
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
        """The rows that a micro-batch of this process is made of, as their samples' ids."""
        return [
            unit[0].id
            for row in self._rows(position, place)
            for unit in map(self.prepared.unit, row)
        ]

    def killed_worker(self, error: RuntimeError) -> DataError | None:
        """The error that names the rows a killed loader process was at; None if `error` tells of something else."""
        if self.loading is None or "DataLoader worker" not in str(error):
            return None
        position = self.loading.position
        numbers = self.loading.numbers
        place = self.loading.place
        pids = self.loading.pids
        said = re.search(r"pid\D*(\d+)", str(error))
        worker = (
            pids.index(int(said[1])) if said and int(said[1]) in pids else place % max(len(pids), 1)
        )
        # Batches are dealt out in turns: it was at the first one of its own that is still to come.
        turns = range(place, len(numbers)) if pids else range(0)
        number = next(
            (numbers[turn] for turn in turns if turn % len(pids) == worker), numbers[place]
        )
        return DataError(
            f"a loader process was killed ({reason_of(error)}) at step {number[0] + 1} of epoch {position.epoch + 1} or soon "
            f"after: {', '.join(self.rows_of(position, number)[:8])}. train.loader_workers: 0 shows whether a row does it; "
            "if memory ran out, fewer workers take less",
            source="data.train",
            kind="worker",
        )


@dataclass(frozen=True)
class Augmented:
    """Pixels changed at random, drawn from (seed, epoch, sample id)."""

    fetch: Fetch
    augment: Augment
    seed: int
    epoch: int

    def __call__(self, media: Media, sample: str) -> torch.Tensor:
        """uint8[3, H, W]."""
        return augment_pixels(
            self.fetch(media), self.augment, (self.seed, self.epoch, zlib.crc32(sample.encode()))
        )


def _ahead(feed: PreparedFeed, position: Position, numbers: list[Place]) -> Iterator[Batch]:
    """Batches made by worker processes."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    class Numbered(Dataset[Batch]):
        def __getitem__(self, index: int) -> Batch:
            return feed.batch(position, numbers[index])

    # Batches are a function of their place, so the workers need no sampler and no state, and none of the random numbers
    # that the training draws from.
    loader: Any = DataLoader(
        Numbered(),
        batch_size=None,
        sampler=range(len(numbers)),
        num_workers=feed.workers,
        prefetch_factor=2,
        generator=torch.Generator(),
    )
    # One may be killed before they are all there.
    feed.loading = Loading(position, numbers, 0, [])
    batches = iter(loader)
    for place in range(len(numbers)):
        feed.loading = Loading(
            position, numbers, place, [worker.pid for worker in batches._workers]
        )
        yield next(batches)


def joined(units: list[Group], layout: str) -> list[Example]:
    """The examples of one row: those of a unit as they are, those of several units packed into one."""
    return (
        units[0]
        if len(units) == 1
        else [pack_layout([example for unit in units for example in unit], layout)]
    )


def blank(unit: Group) -> Group:
    """A unit that counts nothing."""
    return [
        replace(example, labels=np.full_like(example.labels, IGNORE_INDEX), questions=0)
        for example in unit
    ]
