"""Streams rows: read, checked and tokenised during training.

This is for more rows than can be prepared, and for hub streams. The order of raw rows is a function
of the seed alone, so a position in it is a number of rows, and a resumed run reads that many again
without tokenising them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count, islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_tune.config.data import DataSection, Source
from vlm_tune.data.batch import Batch
from vlm_tune.data.batching.augmented import Augmented
from vlm_tune.data.batching.collate import Fetch, collate
from vlm_tune.data.batching.grounded import Follower, check_joins
from vlm_tune.data.batching.loader import Position, blank
from vlm_tune.data.batching.row_kinds import row_kinds
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.chat.truncation import fit
from vlm_tune.data.images.augment import moves_things
from vlm_tune.data.packing import pack_layout
from vlm_tune.data.prepare.dataset import Group
from vlm_tune.data.regions import regions_of
from vlm_tune.data.sources.base import SourceReader
from vlm_tune.data.sources.registry import open_source, read_all
from vlm_tune.data.types import Conversation, Media
from vlm_tune.errors import DataError

if TYPE_CHECKING:
    from vlm_tune.data.batching.collate import Inputs

Row = tuple[int, Conversation | DataError]
"""The index of a source, and the conversation or error read from it."""

Share = tuple[int, int]
"""(number, of): share `number`, from 0, of rows that are divided among `of` processes."""


def passes(
    reader: SourceReader, limit: int | None, share: Share = (0, 1)
) -> Iterator[Conversation | DataError]:
    """Yields the rows of a source, or one share of them, again and again without end.

    Raises `DataError` if there are none.
    """
    while True:
        rows = 0
        for row in _shared(reader, limit, share):
            rows += 1
            yield row
        if not rows:
            raise DataError(
                f"no rows{f' for process {share[0]} of {share[1]}' if share[1] > 1 else ''}",
                source=reader.name,
            )


def _shared(
    reader: SourceReader, limit: int | None, share: Share
) -> Iterator[Conversation | DataError]:
    """Yields one process's share of a source.

    It is every n-th chunk (shards, parts of files), or every n-th row if the source has a limit or
    fewer than n chunks.
    """
    number, of = share
    if limit is not None or len(list(islice(reader.chunks(), of))) < of:
        return islice(read_all([reader]), number, limit, of)
    return (
        row
        for chunk in reader.chunks()
        if chunk.number % of == number
        for row in reader.conversations(chunk)
    )


def mixed(
    readers: Sequence[SourceReader], sources: Sequence[Source], seed: int, share: Share = (0, 1)
) -> Iterator[Row]:
    """Yields rows of the sources, or of one share of each, without end.

    Sources are mixed by their weights (or counts, or evenly), exact to the row: every row drawn
    adds each source's ratio to its debt, and the source with the largest debt is next.
    """
    shares = [source.weight or float(source.count or 1) for source in sources]
    total = sum(shares)
    streams = [
        passes(reader, source.limit, share) for reader, source in zip(readers, sources, strict=True)
    ]
    # Ties are decided by a random order.
    order = random.Random(seed).sample(range(len(sources)), len(sources))
    owed = [0.0] * len(sources)
    while True:
        owed = [debt + share / total for debt, share in zip(owed, shares, strict=True)]
        chosen = max(order, key=lambda number: owed[number])
        owed[chosen] -= 1
        yield chosen, next(streams[chosen])


def shuffled(rows: Iterator[Row], size: int, seed: int) -> Iterator[Row]:
    """Yields the rows shuffled within a buffer of `size` rows."""
    drawn = random.Random(seed)
    buffer = list(islice(rows, size))
    for row in rows:
        place = drawn.randrange(len(buffer))
        buffer[place], chosen = row, buffer[place]
        yield chosen


@dataclass
class StreamFeed:
    """Batches of streamed rows; `report` is called with the error of every unusable row.

    A step takes the next `batch_size` x `accumulation` rows for each of `planned` processes, and
    its micro-batches divide them, each with rows of one kind; with `by_task` that is one task. An
    unusable row leaves its micro-batch smaller, so the rows of a step are a function of its number.
    Raises `DataError` according to the policy for bad rows.
    """

    data: DataSection
    sources: Sequence[Source]
    processor: Processor
    fetch: Fetch
    batch_size: int
    seed: int
    rank: int = 0
    ranks: int = 1
    planned: int | None = None
    accumulation: int = 1
    by_task: bool = False
    report: Callable[[DataError], None] = lambda error: None
    bad: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.planned = self.planned or self.ranks
        self.readers = [
            open_source(source, seed=self.seed, streaming=True) for source in self.sources
        ]
        self.processors = [
            self.processor.variant(source.template, source.system, source.enable_thinking)
            for source in self.sources
        ]
        self.kinds = row_kinds(self.sources, by_task=self.by_task)
        self._last: Group | None = None

    @property
    def step_rows(self) -> int:
        """The number of rows that a step reads, over all processes."""
        return self.batch_size * self.accumulation * (self.planned or self.ranks)

    def cut(self) -> dict[str, Any]:
        """Everything that the order of rows and the rows of each step depend on."""
        sharding = {"own_shards": self.planned} if self.data.own_shards else {}
        order = {
            "seed": self.seed,
            "rows": self.step_rows,
            "shuffle_buffer": self.data.shuffle_buffer,
            **sharding,
        }
        sources = [
            source.model_dump_json(exclude={"template", "system"}, exclude_defaults=True)
            for source in self.sources
        ]
        return {**order, "sources": [[source, None] for source in sources]}

    def steps(self, position: Position) -> None:
        """Returns None: a stream has no epochs."""
        return

    def share(self, position: Position) -> float:
        """Returns 0: the epoch is endless."""
        return 0.0

    def drawn(self, position: Position) -> dict[str, np.ndarray]:
        """Returns no arrays: the position holds the number of rows read."""
        return {}

    def resumed(
        self, position: Position, cut: dict[str, Any], drawn: Mapping[str, np.ndarray]
    ) -> Position:
        """Maps a checkpoint's position to this plan: after as many rows, in whatever order now."""
        if cut == self.cut():
            return position
        return Position(rows=position.rows + position.step * cut["rows"])

    def windows(self, position: Position) -> Iterator[list[Batch]]:
        """Yields this process's micro-batches of each step from the position on."""
        planned = self.planned or self.ranks
        mine, shares = self._streams(planned)
        size = self.step_rows // planned if self.data.own_shards else self.step_rows
        first = position.rows // shares + position.step * size
        streams = [islice(self._stream(share), first, None) for share in mine]
        for step in count(position.step):
            drawn = [list(islice(rows, size)) for rows in streams]
            if self.data.own_shards and planned == self.ranks:
                (rows,) = drawn
                parts = self._parts(rows, self.batch_size)
                yield [self._batch(part, part, step) for part in parts]
                continue
            rows = list(chain.from_iterable(drawn))
            parts = self._parts(rows, self.batch_size * self.ranks)
            yield [self._batch(part[self.rank :: self.ranks], part, step) for part in parts]

    def _parts(self, rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
        """The rows of a step in parts of one kind and of at most `size` rows each."""
        parts: list[Sequence[Row]] = []
        for kind in dict.fromkeys(self.kinds[source] for source, _ in rows):
            of_kind = [row for row in rows if self.kinds[row[0]] == kind]
            parts += _evenly(of_kind, -(-len(of_kind) // size))
        return parts

    def _streams(self, planned: int) -> tuple[list[Share], int]:
        """The shares of the rows that this process reads, and the number of shares in all."""
        if not self.data.own_shards:
            # Every process reads all rows, so none has to communicate with another.
            return [(0, 1)], 1
        mine = [self.rank] if self.ranks == planned else range(planned)
        return [(number, planned) for number in mine], planned

    def _stream(self, share: Share) -> Iterator[Row]:
        """Yields the rows of one share of the sources, shuffled."""
        number, of = share
        rows = mixed(self.readers, self.sources, self.seed, share)
        return shuffled(rows, max(self.data.shuffle_buffer // of, 1), self.seed + number)

    def _batch(self, rows: Sequence[Row], part: Sequence[Row], step: int) -> Batch:
        """This process's batch of its `rows` in a micro-batch of all processes, which is `part`."""
        pixels: dict[Media, Inputs] = {}
        attempts: dict[str, int | None] = {}
        usable = (self._usable(source, row, pixels, step, attempts) for source, row in rows)
        groups = [group for group in usable if group]
        if groups:
            self._last = groups[0]
        elif self._last is None:
            usable = (self._usable(source, row, pixels, step, {}) for source, row in part)
            self._last = next((group for group in usable if group), None)
        if self._last is None:
            raise DataError("none of the first rows can be used", source="data.train")
        groups = groups or [blank(self._last)]
        spec = self.processor.spec
        if self.data.packing:
            groups = [
                [pack_layout(row, spec.layout)] for row in _filled(groups, self.data.row_length)
            ]
        examples = [example for group in groups for example in group]

        def fetch(media: Media) -> Inputs:
            return self._pixels(media, pixels)

        if self.data.augment is None:
            batch = collate(examples, spec, fetch=fetch)
        else:
            changed = Augmented(fetch, self.data.augment, self.seed, step, attempts)
            owners = [example.id for example in examples]
            batch = collate(examples, spec, fetch_for=changed, owners=owners)
        batch.task, batch.loss_weight, batch.objective = self.kinds[part[0][0]]
        return batch

    def _usable(
        self,
        number: int,
        row: Conversation | DataError,
        pixels: dict[Media, Inputs],
        step: int,
        attempts: dict[str, int | None],
    ) -> Group:
        """A row's examples in a step; none if it is unusable.

        Its images are decoded into `pixels`. Where its boxes follow them, the draws of their
        augmentation are noted in `attempts`.
        """
        try:
            if isinstance(row, DataError):
                raise row
            try:
                fitted = fit(row, self.processors[number], self.data.overlong)
                if fitted.overlong and self.data.overlong == "fail":
                    raise DataError(
                        f"more than data.max_length {self.processor.spec.max_length} tokens",
                        kind="overlong",
                    )
                for example in fitted.examples:
                    for media in example.media:
                        self._pixels(media, pixels)
            except DataError as error:
                raise DataError(
                    error.message, source=row.source, row=row.row, kind=error.kind
                ) from None
            return self._followed(number, row, fitted.examples, step, attempts)
        except DataError as error:
            self.bad += 1
            if self.data.on_bad_row == "fail" or error.kind == "overlong":
                raise
            if self.bad > self.data.max_bad_rows:
                raise DataError(
                    f"more than {self.data.max_bad_rows} bad rows (data.max_bad_rows); "
                    f"the last: {error}"
                ) from None
            self.report(error)
            return []

    def _followed(
        self,
        number: int,
        row: Conversation,
        examples: Group,
        step: int,
        attempts: dict[str, int | None],
    ) -> Group:
        """A row's examples with its boxes where the augmentation puts them."""
        augment = self.data.augment
        if augment is None or not moves_things(augment) or not regions_of(row):
            return examples
        check_joins(self.data)
        follower = Follower(augment, self.data, self.seed)
        followed = []
        for example in examples:
            moved, attempts[example.id] = follower(row, example, self.processors[number], step)
            followed.append(moved)
        return followed

    def _pixels(self, media: Media, pixels: dict[Media, Inputs]) -> Inputs:
        if media not in pixels:
            pixels[media] = self.fetch(media)
        return pixels[media]


def usable_rows(
    data: DataSection, sources: Sequence[Source], processor: Processor, seed: int, most: int
) -> list[Conversation]:
    """The usable conversations among the first `most` rows of streamed sources.

    They can be read and decoded, and their prompts fit into `max_length`.
    """
    readers = [open_source(source, seed=seed, streaming=True) for source in sources]
    processors = [
        processor.variant(source.template, source.system, source.enable_thinking)
        for source in sources
    ]
    rows: list[Conversation] = []
    for number, row in islice(mixed(readers, sources, seed), most):
        if isinstance(row, DataError):
            continue
        try:
            fits = len(processors[number].prompt(row).input_ids) <= data.max_length
            for item in row.media:
                processor.images.inputs(item)
        except DataError:
            continue
        if fits:
            rows.append(row)
    return rows


def _evenly(rows: Sequence[Row], number: int) -> list[Sequence[Row]]:
    """Divides rows in order into `number` parts whose sizes differ by one at most."""
    edges = [len(rows) * place // number for place in range(number + 1)]
    return [rows[start:end] for start, end in pairwise(edges)]


def _filled(groups: Sequence[Group], limit: int) -> list[Group]:
    """Packs examples of all groups into rows of at most `limit` tokens, first-fit decreasing."""
    rows: list[tuple[int, Group]] = []
    for example in sorted(
        (example for group in groups for example in group),
        key=lambda example: -len(example.input_ids),
    ):
        size = len(example.input_ids)
        for place, (used, row) in enumerate(rows):
            if used + size <= limit:
                rows[place] = (used + size, [*row, example])
                break
        else:
            rows.append((size, [example]))
    return [row for _, row in rows]
