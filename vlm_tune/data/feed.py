"""What the training loop takes its batches from: prepared rows by a plan, or rows that are read as they come."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vlm_tune.config import Augment
from vlm_tune.data.collate import Fetch, collate
from vlm_tune.data.images import augment_pixels
from vlm_tune.data.joining import pack_layout
from vlm_tune.data.plan import Plan, Rows
from vlm_tune.data.prepared import Group, Prepared
from vlm_tune.data.types import IGNORE_INDEX, Batch, Example, InputSpec, Media
from vlm_tune.errors import DataError

if TYPE_CHECKING:
    import torch


class Feed(Protocol):
    """Batches of every epoch, from any place of it.

    They are planned for a number of processes, and shared out among as many as there are: a process takes each planned
    micro-batch in `pieces`, so that a resumed run sees the same rows in the same step and none takes more memory.
    """

    pieces: int

    def micro_batches(self, epoch: int) -> int | None:
        """How many an epoch has; None for an epoch without an end."""
        ...

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """This process's micro-batches of an epoch from number `first`."""
        ...


@dataclass(frozen=True)
class Loading:
    """Which micro-batch of an epoch the worker processes are waited for, as a place in `numbers`."""

    epoch: int
    numbers: range
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
        self.pieces = -(-plan.sizes.ranks // self.ranks)
        self.prepared, self.plan, self.spec, self.fetch = prepared, plan, spec, fetch
        self.cached, self.augment, self.rank, self.workers = cached, augment, rank, workers
        self.loading: Loading | None = None

    def micro_batches(self, epoch: int) -> int:
        """How many an epoch has."""
        return len(self.plan.epoch(epoch)) * self.pieces

    def batch(self, epoch: int, number: int) -> Batch:
        """One micro-batch of this process; where the last one has no row for it, a row whose labels are ignored."""
        rows = self._rows(epoch, number)
        if not rows:
            planned, place = self.plan.epoch(epoch), number // self.pieces
            (row, *_) = next(rows for rank in range(self.plan.sizes.ranks) if (rows := planned.rows(place, rank)))
            return self._collate([[blank(self.prepared.unit(row[0]))]], epoch)
        return self._collate([[self.prepared.unit(unit) for unit in row] for row in rows], epoch)

    def _rows(self, epoch: int, number: int) -> Rows:
        """The rows of a micro-batch of this process."""
        place, piece = divmod(number, self.pieces)
        return self.plan.epoch(epoch).rows(place, self.rank * self.pieces + piece, self.ranks * self.pieces)

    def _collate(self, rows: list[list[Group]], epoch: int) -> Batch:
        made = [joined(row, self.spec.layout) for row in rows]
        examples = [example for row in made for example in row]
        if self.augment is None:
            return collate(examples, self.spec, fetch=self.fetch, cached=self.cached)
        owners = [row[0][0].id for row, found in zip(rows, made, strict=True) for _ in found]
        return collate(examples, self.spec, fetch_for=Augmented(self.fetch, self.augment, self.plan.seed, epoch), owners=owners)

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """This process's micro-batches from number `first`; made ahead by worker processes where there are any."""
        numbers = range(first, self.micro_batches(epoch))
        if not self.workers:
            return (self.batch(epoch, number) for number in numbers)
        return _ahead(self, epoch, numbers)

    def rows_of(self, epoch: int, number: int) -> list[str]:
        """The rows that a micro-batch of this process is made of, as their samples' ids."""
        return [unit[0].id for row in self._rows(epoch, number) for unit in map(self.prepared.unit, row)]

    def killed_worker(self, error: RuntimeError) -> DataError | None:
        """The error that names the rows a killed loader process was at; None if `error` tells of something else."""
        if self.loading is None or "DataLoader worker" not in str(error):
            return None
        epoch, numbers, place, pids = astuple(self.loading)
        said = re.search(r"pid\D*(\d+)", str(error))
        worker = pids.index(int(said[1])) if said and int(said[1]) in pids else place % max(len(pids), 1)
        # Batches are dealt out in turns: it was at the first one of its own that is still to come.
        turns = range(place, len(numbers)) if pids else range(0)
        number = next((numbers[turn] for turn in turns if turn % len(pids) == worker), numbers[place])
        return DataError(
            f"a loader process was killed ({str(error).splitlines()[0]}) at micro-batch {number} of epoch {epoch + 1} or soon after: "
            f"{', '.join(self.rows_of(epoch, number)[:8])}. train.loader_workers: 0 shows whether a row does it; if memory ran out, "
            "fewer workers take less",
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
        return augment_pixels(self.fetch(media), self.augment, (self.seed, self.epoch, zlib.crc32(sample.encode())))


def _ahead(feed: PreparedFeed, epoch: int, numbers: range) -> Iterator[Batch]:
    """Batches made by worker processes."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    class Numbered(Dataset[Batch]):
        def __getitem__(self, index: int) -> Batch:
            return feed.batch(epoch, index)

    # Batches are a function of their number, so the workers need no sampler and no state, and none of the random numbers
    # that the training draws from.
    loader: Any = DataLoader(
        Numbered(), batch_size=None, sampler=numbers, num_workers=feed.workers, prefetch_factor=2, generator=torch.Generator()
    )
    # One may be killed before they are all there.
    feed.loading = Loading(epoch, numbers, 0, [])
    batches = iter(loader)
    for place in range(len(numbers)):
        feed.loading = Loading(epoch, numbers, place, [worker.pid for worker in batches._workers])
        yield next(batches)


def joined(units: list[Group], layout: str) -> list[Example]:
    """The examples of one row: those of a unit as they are, those of several units packed into one."""
    return units[0] if len(units) == 1 else [pack_layout([example for unit in units for example in unit], layout)]


def blank(unit: Group) -> Group:
    """A unit that counts nothing."""
    return [replace(example, labels=np.full_like(example.labels, IGNORE_INDEX), questions=0) for example in unit]
