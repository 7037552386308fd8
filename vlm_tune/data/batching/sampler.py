"""Selects the units of each optimizer step, as a function of (seed, epoch) alone.

An epoch is cut into global batches, the rows of one optimizer step over all micro-batches and
processes, and only then is a global batch split. So 4x1, 2x2, 1x4 and two processes train on the
same rows in the same order. A global batch is split so that the processes have equal work: tokens,
and images weighted by their cost; and a micro-batch has rows of one kind (`row_kinds`).
"""

from __future__ import annotations

import heapq
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_tune.config.data import SHARES, DataSection
from vlm_tune.config.train import TrainSection
from vlm_tune.data.batching.mixture import epoch_counts
from vlm_tune.data.batching.row_kinds import RowKind, numbered, row_kinds, split_by_kind
from vlm_tune.data.prepare.dataset import Prepared
from vlm_tune.errors import DataError

BUCKET = 32
STRETCH = 2048
"""How many global batches (`BUCKET`), and rows (`STRETCH`), are sorted by length together.

It reduces padding, and every step still mixes lengths and sources.
"""

PACK_WINDOW = 2048
"""Units that are packed together; a bound, so that the order within an epoch stays mixed."""

UNORDERED = SHARES | {"template", "system"}
"""Options of a source that do not change the order of its rows."""

Rows = list[list[int]]
"""The rows of a micro-batch; each is a list of units, several if they are packed."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a step and its micro-batches.

    A micro-batch holds `batch_size` rows or `batch_tokens` padded tokens of one process. A step
    takes `accumulation` micro-batches for each of `ranks` processes, the number that the run began
    with. An image costs as much as `image_cost` tokens.
    """

    batch_size: int
    batch_tokens: int | None = None
    ranks: int = 1
    image_cost: float = 0.0
    accumulation: int = 1

    @classmethod
    def of(cls, train: TrainSection, ranks: int = 1, image_cost: float = 0.0) -> Sizes:
        """The sizes configured in a recipe's train section."""
        return cls(
            train.batch_size, train.batch_tokens, ranks, image_cost, train.gradient_accumulation
        )

    @property
    def step_rows(self) -> int | None:
        """Rows of a step; None if steps are sized by tokens."""
        return (
            None
            if self.batch_tokens is not None
            else self.batch_size * self.accumulation * self.ranks
        )

    @property
    def step_tokens(self) -> int | None:
        """Padded tokens of a step; None if steps are sized by rows."""
        return (
            None
            if self.batch_tokens is None
            else self.batch_tokens * self.accumulation * self.ranks
        )


def planned_steps(train: TrainSection, epoch_steps: int) -> int:
    """Optimizer steps of a stage whose first epoch has `epoch_steps`."""
    return train.steps or max(round((train.epochs or 1) * epoch_steps), 1)


class Epoch:
    """The rows of one epoch and the rows that each optimizer step takes.

    Row i holds `units[starts[i]:starts[i + 1]]`. `longest` (padded length), `costs` and `kinds`
    have one number for each row; `steps` holds the row numbers of each step.
    """

    def __init__(
        self,
        units: np.ndarray,
        starts: np.ndarray,
        longest: np.ndarray,
        costs: np.ndarray,
        kinds: np.ndarray,
        steps: list[np.ndarray],
        sizes: Sizes,
    ) -> None:
        self.units = units
        self.starts = starts
        self.longest = longest
        self.costs = costs
        self.kinds = kinds
        self.steps = steps
        self.sizes = sizes
        self._last: tuple[tuple[int, int], list[list[np.ndarray]]] | None = None
        rows = np.array([len(step) for step in steps], dtype=np.int64)
        per_row = np.diff(starts)
        taken = (
            np.add.reduceat(per_row[np.concatenate(steps)], np.cumsum(rows) - rows)
            if len(steps)
            else rows
        )
        self._units_before = np.concatenate([[0], np.cumsum(taken)])

    def __len__(self) -> int:
        return len(self.steps)

    def units_before(self, step: int) -> int:
        """The number of units that the steps before `step` take."""
        return int(self._units_before[step])

    def shares(self, step: int, ranks: int) -> list[list[np.ndarray]]:
        """The micro-batches of a step, each as one share of row numbers for every rank.

        A share is empty if a micro-batch has fewer rows than there are ranks.
        """
        if self._last is None or self._last[0] != (step, ranks):
            self._last = (step, ranks), self._split(step, ranks)
        return self._last[1]

    def _split(self, step: int, ranks: int) -> list[list[np.ndarray]]:
        tokens = self.sizes.batch_tokens
        shares: list[list[np.ndarray]] = []
        for rows in split_by_kind(self.steps[step], self.kinds):
            if tokens is not None:
                shares += _token_shares(rows, self.longest, self.costs, tokens, ranks)
                continue
            number = -(-len(rows) // (self.sizes.batch_size * ranks))
            parts = np.array_split(rows, number)
            shares += [even_shares(part, self.costs, ranks) for part in parts]
        return shares

    def kind(self, step: int, number: int, ranks: int) -> int:
        """The kind of the rows of a step's micro-batch `number`."""
        row = next(share[0] for share in self.shares(step, ranks)[number] if len(share))
        return int(self.kinds[row])

    def rows(self, step: int, number: int, rank: int, ranks: int) -> Rows:
        """The rows of a rank's share of a step's micro-batch `number`."""
        return self.units_of(self.shares(step, ranks)[number][rank])

    def units_of(self, rows: np.ndarray) -> Rows:
        """The units of each row."""
        return [
            self.units[self.starts[row] : self.starts[row + 1]].tolist() for row in rows.tolist()
        ]

    def places(self, ranks: int, first: int = 0) -> list[tuple[int, int]]:
        """(step, number) of every micro-batch from step `first` on."""
        return [
            (step, number)
            for step in range(first, len(self))
            for number in range(len(self.shares(step, ranks)))
        ]

    def drawn(self, steps: int) -> np.ndarray:
        """The units of the first `steps` steps; one that was drawn twice appears twice."""
        rows = np.concatenate(self.steps[:steps]) if steps else np.empty(0, dtype=np.int64)
        parts = [self.units[self.starts[row] : self.starts[row + 1]] for row in rows.tolist()]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def even_shares(rows: np.ndarray, costs: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Divides rows into one share for each rank; their sizes differ by one at most.

    Costs are balanced greedily: the most expensive row goes first, to the rank with the least cost.
    """
    if ranks == 1:
        return [rows]
    least, larger = divmod(len(rows), ranks)
    shares: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0.0, rank) for rank in range(ranks)]
    for place in np.argsort(-costs[rows], kind="stable").tolist():
        spent, rank = heapq.heappop(heap)
        while len(shares[rank]) == least and not larger:
            spent, rank = heapq.heappop(heap)  # the other one is full
        if len(shares[rank]) == least:
            larger -= 1
        shares[rank].append(place)
        if len(shares[rank]) <= least:
            heapq.heappush(heap, (spent + float(costs[rows[place]]), rank))
    return [rows[np.array(sorted(share), dtype=np.int64)] for share in shares]


class Plan:
    """The steps of every epoch. Raises `DataError` if there are fewer units than processes.

    Attributes:
        kinds: The kinds of rows that no micro-batch mixes.
    """

    def __init__(
        self,
        prepared: Prepared,
        data: DataSection,
        sizes: Sizes,
        seed: int,
        *,
        by_task: bool = False,
    ) -> None:
        """Plans the batches of prepared rows; with `by_task` a micro-batch is of one task."""
        kinds = row_kinds(prepared.sources, by_task=by_task)
        self.kinds: list[RowKind] = list(dict.fromkeys(kinds))
        self.unit_kinds = numbered(kinds)[prepared.unit_sources]
        self.data = data
        self.sizes = sizes
        self.seed = seed
        self.lengths = prepared.unit_lengths
        self.unit_costs = prepared.unit_costs(sizes.image_cost)
        self.by_source = [
            np.flatnonzero(prepared.unit_sources == number)
            for number in range(len(prepared.sources))
        ]
        self.counts = epoch_counts([len(units) for units in self.by_source], prepared.sources, data)
        if 0 < sum(self.counts) < sizes.ranks:
            units = (
                f"{sum(self.counts)} "
                f"{'images with their rows' if data.group == 'image' else 'rows'} an epoch"
            )
            raise DataError(
                f"{units} for {sizes.ranks} processes: some would train on nothing; start fewer",
                source="data.train",
            )
        self._last: tuple[int, np.ndarray | None, Epoch] | None = None

    def epoch(self, epoch: int, before: np.ndarray | None = None) -> Epoch:
        """The epoch's steps.

        `before` holds how often each unit was already drawn in this epoch, under another plan; only
        the rest is cut into steps.
        """
        if self._last is None or self._last[0] != epoch or self._last[1] is not before:
            self._last = epoch, before, self._cut(epoch, before)
        return self._last[2]

    def cut(self, prepared: Prepared) -> dict[str, Any]:
        """Everything that the order of units and the rows of each step depend on, as JSON.

        Plans with equal cuts take the same steps.
        """
        # Rows are packed within their kind.
        apart = [list(kind) for kind in self.kinds]
        return {
            "seed": self.seed,
            "lengths": zlib.crc32(np.ascontiguousarray(self.lengths).tobytes()),
            "rows": self.sizes.step_rows,
            "tokens": self.sizes.step_tokens,
            "packing": self.data.packing and self.data.row_length,
            "counts": self.counts,
            "sources": [
                [source.model_dump_json(exclude=UNORDERED, exclude_defaults=True), len(units)]
                for source, units in zip(prepared.sources, self.by_source, strict=True)
            ],
            **({"kinds": apart} if self.data.packing and len(apart) > 1 else {}),
        }

    def units(self, epoch: int) -> np.ndarray:
        """The units of an epoch, source by source, as many of each as its share.

        No unit of a source is drawn again before all of them were drawn.
        """
        drawn = []
        for number, (units, count) in enumerate(zip(self.by_source, self.counts, strict=True)):
            position = epoch * count
            end = (epoch + 1) * count
            while position < end:
                turn, start = divmod(position, len(units))
                taken = min(end - position, len(units) - start)
                order = np.random.default_rng((self.seed, number, turn)).permutation(units)
                drawn.append(order[start : start + taken])
                position += taken
        return np.concatenate(drawn) if drawn else np.empty(0, dtype=np.int64)

    def _cut(self, epoch: int, before: np.ndarray | None) -> Epoch:
        random = np.random.default_rng((self.seed, epoch))
        units = random.permutation(self.units(epoch))
        if before is not None:
            units = _without(units, before)
        starts = np.arange(len(units) + 1)
        longest = self.lengths[units, 0]
        if self.data.packing and len(units):
            units, starts = self._packed(units)
            alone = np.diff(starts) == 1
            longest = np.where(
                alone,
                self.lengths[units[starts[:-1]], 0],
                np.add.reduceat(self.lengths[units, 1], starts[:-1]),
            )
        costs = (
            np.add.reduceat(self.unit_costs[units], starts[:-1]) if len(longest) else np.empty(0)
        )
        size = self.sizes.step_rows
        tokens = self.sizes.step_tokens
        if size is not None:
            steps = _by_number(longest, size)
            whole = len(longest) // size
        else:
            assert tokens is not None
            steps = _by_tokens(longest, tokens)
            whole = len(steps)
        mixed = [*(steps[place] for place in random.permutation(whole)), *steps[whole:]]
        kinds = self.unit_kinds[units[starts[:-1]]]
        return Epoch(units, starts, longest, costs, kinds, mixed, self.sizes)

    def _packed(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Packs units into rows of at most `row_length` tokens, by best-fit decreasing.

        Each window of `PACK_WINDOW` units is packed apart, and in it each kind of rows. Returns the
        units in order of the rows, and where each row starts in them, with the end.
        """
        limit = self.data.row_length
        rows = []
        for stretch in (
            of_kind
            for start in range(0, len(units), PACK_WINDOW)
            for of_kind in split_by_kind(units[start : start + PACK_WINDOW], self.unit_kinds)
        ):
            sizes = self.lengths[stretch, 1]
            order = np.argsort(-sizes, kind="stable")
            room: list[list[list[int]]] = [[] for _ in range(limit + 1)]
            for unit, size in zip(stretch[order].tolist(), sizes[order].tolist(), strict=True):
                left = next((left for left in range(size, limit + 1) if room[left]), None)
                if left is None:
                    rows.append(row := [unit])
                else:
                    (row := room[left].pop()).append(unit)
                # A unit that is longer than a row gets a row to itself.
                if (rest := (limit if left is None else left) - size) >= 0:
                    room[rest].append(row)
        return np.concatenate(rows), np.cumsum([0, *map(len, rows)])


def _without(units: np.ndarray, before: np.ndarray) -> np.ndarray:
    """The units in order, without the first `before[unit]` occurrences of each."""
    order = np.argsort(units, kind="stable")
    numbers, first = np.unique(units[order], return_index=True)
    turn = np.arange(len(units)) - np.repeat(first, np.diff(first, append=len(units)))
    left = np.empty(len(units), dtype=bool)
    left[order] = turn >= np.repeat(before[numbers], np.diff(first, append=len(units)))
    return units[left]


def _stretch(rows: int) -> int:
    """The number of rows that are sorted by length together if a step takes `rows`."""
    return rows * max(min(BUCKET, STRETCH // rows), 1)


def _by_number(lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """Steps of `size` rows of similar length, sorted; an incomplete step is the last."""
    whole = len(lengths) // size * size
    steps = []
    for start in range(0, whole, _stretch(size)):
        places = np.arange(start, min(start + _stretch(size), whole))
        steps += list(places[np.argsort(lengths[places], kind="stable")].reshape(-1, size))
    if whole < len(lengths):
        places = np.arange(whole, len(lengths))
        steps.append(places[np.argsort(lengths[places], kind="stable")])
    return steps


def _by_tokens(lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Steps of rows of similar length, sorted, of at most `tokens` padded tokens.

    A longer row is a step of its own.
    """
    stretch = _stretch(max(int(tokens / max(lengths.mean(), 1)), 1)) if len(lengths) else 1
    steps: list[np.ndarray] = []
    for start in range(0, len(lengths), stretch):
        places = np.arange(start, min(start + stretch, len(lengths)))
        places = places[np.argsort(lengths[places], kind="stable")]
        steps += _budgeted(places, lengths, tokens)
    return steps


def _budgeted(rows: np.ndarray, lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Cuts sorted rows into parts of at most `tokens` padded tokens, or of one longer row."""
    parts = []
    first = 0
    for place in range(1, len(rows) + 1):
        # Rows are sorted, so the next row is the longest.
        if place == len(rows) or (place - first + 1) * lengths[rows[place]] > tokens:
            parts.append(rows[first:place])
            first = place
    return parts


def _token_shares(
    rows: np.ndarray, lengths: np.ndarray, costs: np.ndarray, tokens: int, ranks: int
) -> list[list[np.ndarray]]:
    """Divides a step's rows into micro-batches of at most `tokens` padded tokens.

    Returns a list for each micro-batch with the row numbers of every rank; the ranks' parts have
    similar costs.
    """
    parts = _budgeted(rows, lengths, tokens)

    def cost(part: np.ndarray) -> float:
        return float(costs[part].sum())

    while len(parts) % ranks:
        # A rank without rows would wait for the others, so the most expensive part that can be
        # halved is split.
        place = max(
            (place for place, part in enumerate(parts) if len(part) > 1),
            key=lambda place: cost(parts[place]),
            default=None,
        )
        if place is None:
            parts.append(np.empty(0, dtype=np.int64))
        else:
            parts[place : place + 1] = np.array_split(parts[place], 2)
    parts.sort(key=cost)
    return [parts[start : start + ranks] for start in range(0, len(parts), ranks)]
