"""Which units make which batch: a function of (seed, epoch), the same for any number of processes of one global batch.

A micro-batch is shared out among the processes so that each has as much to do: tokens, and images by what they cost.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm_tune.config import DataSection, Source
from vlm_tune.data.prepared import Prepared
from vlm_tune.errors import DataError

BUCKET = 32
"""Batches whose rows are sorted by length together: less padding, and still a mixture in every batch."""

PACK_WINDOW = 2048
"""Units that are packed together; the order within an epoch stays mixed."""

Rows = list[list[int]]
"""The rows of a micro-batch; each is a list of units, several where they are packed."""


@dataclass(frozen=True)
class Sizes:
    """How batches are cut: rows, or padded tokens, of one process's micro-batch; an image costs as much as some tokens."""

    batch_size: int
    batch_tokens: int | None = None
    ranks: int = 1
    image_cost: float = 0.0


@dataclass(frozen=True)
class Epoch:
    """One epoch: rows (`units` from `starts`) and what each costs, and the micro-batches of rows with one share for each rank."""

    units: np.ndarray
    starts: np.ndarray
    costs: np.ndarray
    batches: list[list[np.ndarray]]

    def __len__(self) -> int:
        return len(self.batches)

    def rows(self, batch: int, rank: int, ranks: int | None = None) -> Rows:
        """The rows of a rank's share of a micro-batch; none where the last one is too small for all.

        With `ranks` the whole micro-batch is shared out among so many instead of those it was planned for.
        """
        shares = self.batches[batch]
        if ranks is not None and ranks != len(shares):
            shares = even_shares(np.concatenate(shares), self.costs, ranks)
        return [self.units[self.starts[row] : self.starts[row + 1]].tolist() for row in shares[rank].tolist()]


def even_shares(rows: np.ndarray, costs: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Rows in shares of equal number, or one less, whose costs are as even as giving out the dearest first makes them."""
    if ranks == 1:
        return [rows]
    room = [-(-len(rows) // ranks)] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0.0, rank) for rank in range(ranks)]
    for place in np.argsort(-costs[rows], kind="stable").tolist():
        spent, rank = heapq.heappop(heap)
        shares[rank].append(place)
        if len(shares[rank]) < room[rank]:
            heapq.heappush(heap, (spent + float(costs[rows[place]]), rank))
    return [rows[np.array(sorted(share), dtype=np.int64)] for share in shares]


class Plan:
    """The batches of every epoch. Raises `DataError` for fewer units than processes."""

    def __init__(self, prepared: Prepared, data: DataSection, sizes: Sizes, seed: int) -> None:
        self.data, self.sizes, self.seed = data, sizes, seed
        self.lengths, self.unit_costs = prepared.unit_lengths, prepared.unit_costs(sizes.image_cost)
        self.by_source = [np.flatnonzero(prepared.unit_sources == number) for number in range(len(prepared.sources))]
        self.counts = epoch_counts([len(units) for units in self.by_source], prepared.sources, data.epoch_size)
        if 0 < sum(self.counts) < sizes.ranks:
            units = f"{sum(self.counts)} {'images with their rows' if data.group == 'image' else 'rows'} an epoch"
            raise DataError(f"{units} for {sizes.ranks} processes: some would train on nothing; start fewer", source="data.train")
        self._last: tuple[int, Epoch] | None = None

    def epoch(self, epoch: int) -> Epoch:
        """The epoch's micro-batches."""
        if self._last is None or self._last[0] != epoch:
            self._last = epoch, self._cut(epoch)
        return self._last[1]

    def units(self, epoch: int) -> np.ndarray:
        """The units of an epoch, source by source: of each as many as its share, none again before all were drawn."""
        drawn = []
        for number, (units, count) in enumerate(zip(self.by_source, self.counts, strict=True)):
            position, end = epoch * count, (epoch + 1) * count
            while position < end:
                turn, start = divmod(position, len(units))
                taken = min(end - position, len(units) - start)
                order = np.random.default_rng((self.seed, number, turn)).permutation(units)
                drawn.append(order[start : start + taken])
                position += taken
        return np.concatenate(drawn) if drawn else np.empty(0, dtype=np.int64)

    def _cut(self, epoch: int) -> Epoch:
        random = np.random.default_rng((self.seed, epoch))
        units = random.permutation(self.units(epoch))
        starts = np.arange(len(units) + 1)
        longest = self.lengths[units, 0]
        if self.data.packing:
            units, starts = self._packed(units)
            alone = np.diff(starts) == 1
            longest = np.where(alone, self.lengths[units[starts[:-1]], 0], np.add.reduceat(self.lengths[units, 1], starts[:-1]))
        ranks = self.sizes.ranks
        costs = np.add.reduceat(self.unit_costs[units], starts[:-1]) if len(longest) else np.empty(0)
        if self.sizes.batch_tokens is not None:
            batches = _by_tokens(longest, costs, self.sizes.batch_tokens, ranks)
            whole = len(batches)
        else:
            size = self.sizes.batch_size * ranks
            batches = [even_shares(batch, costs, ranks) for batch in _by_number(longest, size)]
            whole = len(longest) // size
        return Epoch(units, starts, costs, [*(batches[place] for place in random.permutation(whole)), *batches[whole:]])

    def _packed(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Units as rows of at most `row_length` tokens together: of a stretch the longest first, each where it fits best."""
        limit, rows = self.data.row_length, []
        for start in range(0, len(units), PACK_WINDOW):
            stretch = units[start : start + PACK_WINDOW]
            sizes = self.lengths[stretch, 1]
            order = np.argsort(-sizes, kind="stable")
            room: list[list[list[int]]] = [[] for _ in range(limit + 1)]
            for unit, size in zip(stretch[order].tolist(), sizes[order].tolist(), strict=True):
                left = next((left for left in range(size, limit + 1) if room[left]), None)
                if left is None:
                    rows.append(row := [unit])
                else:
                    (row := room[left].pop()).append(unit)
                # A unit that is longer than a row stands alone.
                if (rest := (limit if left is None else left) - size) >= 0:
                    room[rest].append(row)
        return np.concatenate(rows), np.cumsum([0, *map(len, rows)])


def epoch_counts(units: Sequence[int], sources: Sequence[Source], epoch_size: int | None) -> list[int]:
    """How many units of each source make an epoch.

    All of a source that has neither count nor weight. Sources with weights share `epoch_size` by them, to the unit; if
    it is not given, as many as fit without drawing a unit twice.
    """
    weights = np.array([source.weight or 0.0 for source in sources])
    counts = [source.count or number for source, number in zip(sources, units, strict=True)]
    counts = [count if number else 0 for count, number in zip(counts, units, strict=True)]
    weighted = [place for place, number in enumerate(units) if weights[place] and number]
    if not weighted:
        return counts
    shares = weights[weighted] / weights[weighted].sum()
    size = epoch_size or int(min(units[place] / share for place, share in zip(weighted, shares, strict=True)))
    exact = shares * size
    found = np.floor(exact).astype(int)
    for place in np.argsort(-(exact - found), kind="stable")[: size - int(found.sum())]:
        found[place] += 1
    for place, count in zip(weighted, found.tolist(), strict=True):
        counts[place] = count
    return counts


def _by_number(lengths: np.ndarray, batch: int) -> list[np.ndarray]:
    """Batches of `batch` rows of like length; the incomplete one is the last."""
    whole = len(lengths) // batch * batch
    found = []
    for start in range(0, whole, batch * BUCKET):
        places = np.arange(start, min(start + batch * BUCKET, whole))
        found += list(places[np.argsort(lengths[places], kind="stable")].reshape(-1, batch))
    return [*found, np.arange(whole, len(lengths))] if whole < len(lengths) else found


def _by_tokens(lengths: np.ndarray, costs: np.ndarray, tokens: int, ranks: int) -> list[list[np.ndarray]]:
    """Batches of at most `tokens` padded tokens (a longer row stands alone), one for each rank, of like length and cost."""
    window = max(int(BUCKET * tokens * ranks / max(lengths.mean(), 1)), 1) if len(lengths) else 1
    batches: list[np.ndarray] = []
    for start in range(0, len(lengths), window):
        places = np.arange(start, min(start + window, len(lengths)))
        places = places[np.argsort(lengths[places], kind="stable")]
        first, cut = 0, len(batches)
        for place in range(1, len(places) + 1):
            # Sorted, so that the row that comes is the longest.
            if place == len(places) or (place - first + 1) * lengths[places[place]] > tokens:
                batches.append(places[first:place])
                first = place
        batches[cut:] = sorted(batches[cut:], key=lambda batch: float(costs[batch].sum()))
    empty = np.empty(0, dtype=np.int64)
    batches += [empty] * (-len(batches) % ranks)
    return [batches[start : start + ranks] for start in range(0, len(batches), ranks)]
