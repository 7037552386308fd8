"""Prepared rows as training uses them: units of examples by number, and what became of every row."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_tune.data.prepare.arrow_store import (
    ExampleStore,
    MediaRow,
    arrow_indices,
    media_rows,
    numpy_view,
    read_batches,
)
from vlm_tune.data.prepare.job import Job, source_names
from vlm_tune.data.prepare.merge_shards import PARTS, joined_rows
from vlm_tune.data.prepare.worker import BAD, LEFT_OUT, OK, content_hash, files_changed
from vlm_tune.data.sources.registry import read_all
from vlm_tune.data.types import Conversation, Example, Media
from vlm_tune.errors import DataError
from vlm_tune.files import is_intact

if TYPE_CHECKING:
    import pyarrow as pa

Group = list[Example]
"""The examples that make one unit of a batch: a row, or all rows of an image."""


class Prepared:
    """A part's prepared rows in a folder; examples are memory-mapped and made when they are asked for."""

    def __init__(self, folder: Path, job: Job) -> None:
        """Opens a folder that `finish` wrote for the job; `open` looks first whether it can."""
        self.folder = folder
        self.data = job.data
        self.sources = list(job.sources)
        self.layout = job.layout
        self.part = job.part
        self.readers = job.readers
        self.media_rows: list[MediaRow] = [
            row
            for batch in read_batches(folder / "media.arrow")
            for row in media_rows(batch, folder)
        ]
        self.store = ExampleStore(folder / "examples.arrow", [row.media for row in self.media_rows])
        units = np.load(folder / "units.npz")
        self.starts: np.ndarray = units["starts"]
        self.unit_sources: np.ndarray = units["source"]

    @classmethod
    def open(cls, folder: Path, job: Job) -> Prepared | None:
        """What is prepared in `folder`; None if nothing is, it is damaged, or an image changed, went or came since."""
        return cls(folder, job) if is_intact(folder) and not files_changed(folder) else None

    # --- units ---

    def __len__(self) -> int:
        return len(self.starts) - 1

    def unit(self, number: int) -> Group:
        """The examples of a unit."""
        return [self.store[place] for place in range(self.starts[number], self.starts[number + 1])]

    @cached_property
    def unit_lengths(self) -> np.ndarray:
        """Input tokens of each unit's longest example, and of all its examples: int64[len(self), 2]."""
        if not len(self):
            return np.empty((0, 2), dtype=np.int64)
        lengths = self.store.lengths.astype(np.int64)
        first = self.starts[:-1]
        return np.column_stack(
            [np.maximum.reduceat(lengths, first), np.add.reduceat(lengths, first)]
        )

    def unit_costs(self, image_cost: float) -> np.ndarray:
        """What each unit's pass costs, in input tokens, where an image costs as much as `image_cost` of them: float64[len(self)]."""
        tokens = self.unit_lengths[:, 1].astype(np.float64)
        if not image_cost or not len(self):
            return tokens
        return tokens + image_cost * np.add.reduceat(
            self.store.media_counts.astype(np.float64), self.starts[:-1]
        )

    @property
    def questions(self) -> int:
        """Question-answer pairs of all units."""
        return int(self.store.questions.sum())

    @cached_property
    def media(self) -> list[Media]:
        """Every distinct media item that examples show."""
        shown = np.zeros(len(self.media_rows), dtype=bool)
        shown[self.store.shown] = True
        return [
            row.media for row, used in zip(self.media_rows, shown.tolist(), strict=True) if used
        ]

    # --- rows ---

    @cached_property
    def row_batches(self) -> list[pa.RecordBatch]:
        """The records of all rows in order, as `shards.RowRecord`, with `part` and `number` (of the source)."""
        return read_batches(self.folder / "rows.arrow")

    @property
    def joins(self) -> bool:
        """Whether rows of an image are joined to one example, or examples are packed."""
        return self.data.packing or int(
            self.column("examples")[self.places(self.part)].sum()
        ) > len(self.store.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest example that is trained on, before examples of an image were joined."""
        return int(self.column("longest")[self.places(self.part)].max(initial=0))

    def column(self, name: str) -> np.ndarray:
        """A numeric column of the row records."""
        found = [numpy_view(batch.column(name)) for batch in self.row_batches]
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def values(self, name: str, places: np.ndarray) -> list[Any]:
        """A column's values for rows at ascending places."""
        found = []
        first = 0
        for batch in self.row_batches:
            start, end = np.searchsorted(places, [first, first + batch.num_rows])
            if end > start:
                found += (
                    batch.column(name).take(arrow_indices(places[start:end] - first)).to_pylist()
                )
            first += batch.num_rows
        return found

    @cached_property
    def shown(self) -> tuple[np.ndarray, np.ndarray]:
        """The media numbers of all rows, and from where in them each row's own are: int32[all], int64[rows + 1]."""
        listed = [batch.column("images") for batch in self.row_batches]
        flat = [
            numpy_view(column.values)[column.offsets[0].as_py() : column.offsets[-1].as_py()]
            for column in listed
        ]
        sizes = [np.diff(numpy_view(column.offsets)) for column in listed]
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(sizes) if sizes else [])]).astype(
            np.int64
        )
        return np.concatenate(flat) if flat else np.empty(0, dtype=np.int32), offsets

    def records(self, *statuses: int) -> Iterator[dict[str, Any]]:
        """The records of rows with one of the statuses."""
        for batch in self.row_batches:
            for place in np.flatnonzero(
                np.isin(numpy_view(batch.column("status")), statuses)
            ).tolist():
                yield {name: batch.column(name)[place].as_py() for name in batch.schema.names}

    @cached_property
    def bad(self) -> int:
        """How many rows can't be used."""
        return int((self.column("status") == BAD).sum())

    @property
    def left_out(self) -> dict[str, int]:
        """How many rows are not trained on, by kind; `overlong` counts examples."""
        found = Counter(
            record["kind"] for record in self.records(BAD, LEFT_OUT) if record["kind"] != "overlong"
        )
        overlong = int(self.column("overlong").sum())
        return dict(sorted(found.items())) | ({"overlong": overlong} if overlong else {})

    def reasons(self, most: int) -> Iterator[str]:
        """What is said of the first rows that are left out."""
        for number, record in enumerate(self.records(BAD, LEFT_OUT)):
            if number == most:
                return
            yield f"{record['source']}, row {record['row']}: {record['message']}"

    def places(self, part: str) -> np.ndarray:
        """The places of usable rows that belong to a part: this one, or one that `data.split` holds out of train.

        Rows to score whose prompt is over `max_length` are not usable.
        """
        if part == self.part:
            return np.flatnonzero((self.column("status") == OK) & (self.column("part") == 0))
        places = self._held_out(part)
        return places[self.prompts_fit(places)]

    def long_prompts(self, part: str) -> np.ndarray:
        """The places of rows that `data.split` holds out for a part, and whose prompt is over `max_length`."""
        places = self._held_out(part)
        return places[~self.prompts_fit(places)]

    def prompts_fit(self, places: np.ndarray) -> np.ndarray:
        """Whether the prompts of rows, without their last answers, are within `max_length`: bool[rows]."""
        return self.column("prompt")[places] <= self.data.max_length

    def _held_out(self, part: str) -> np.ndarray:
        return np.flatnonzero(
            (self.column("status") == OK) & (self.column("part") == PARTS.index(part))
        )

    def conversations(self, places: np.ndarray) -> Iterator[Conversation]:
        """The rows at ascending places, read again from their sources; images that came inside rows are read from here.

        Raises `DataError` where a source is not what it was.
        """
        digests = dict(zip(places.tolist(), self.values("digest", places), strict=True))
        starts = np.searchsorted(self.column("number"), np.arange(len(self.sources) + 1)).tolist()
        for reader, name, first, end in zip(
            self.readers, source_names(self.sources), starts, starts[1:], strict=False
        ):
            wanted = {place for place in digests if first <= place < end}
            for place, row in enumerate(read_all([reader]) if wanted else (), first):
                if place not in wanted:
                    continue
                if not isinstance(row, Conversation) or content_hash(row) != digests[place]:
                    message = "the row is another than when it was prepared: the source was changed meanwhile; start again"
                    raise DataError(message, source=row.source, row=row.row)
                yield replace(self._with_stored_images(row), source_name=name)
                wanted.remove(place)
                if not wanted:
                    break

    def _with_stored_images(self, row: Conversation) -> Conversation:
        """The row, each image that it brought as bytes in place of where it is stored."""
        if not any(isinstance(item.source, bytes) for item in row.media):
            return row
        messages = [
            replace(message, parts=tuple(map(self._stored, message.parts)))
            for message in row.messages
        ]
        return replace(row, messages=tuple(messages))

    def _stored(self, part: str | Media) -> str | Media:
        if isinstance(part, str) or not isinstance(part.source, bytes):
            return part
        return self._media_by_bytes[hashlib.sha256(part.source).digest()]

    @cached_property
    def _media_by_bytes(self) -> dict[bytes, Media]:
        """Whole images by the SHA-256 of their bytes."""
        return {row.info.sha256: row.media for row in self.media_rows if row.media.tile is None}

    def split_problem(self, part: str) -> str | None:
        """Why a part that `data.split` holds out is empty or far from its share; None if it is not, or none is asked for."""
        share = getattr(self.data.split, part) if self.data.split is not None else 0
        usable = np.flatnonzero(self.column("status") == OK)
        wanted = share * len(usable)
        rows = int((self.column("part")[usable] == PARTS.index(part)).sum())
        if not share or not len(usable) or (rows and abs(rows - wanted) <= max(wanted / 2, 1)):
            return None
        shown, offsets = self.shown
        groups = joined_rows(
            usable.tolist(),
            lambda row: shown[offsets[row] : offsets[row + 1]],
            len(self.media_rows),
        )
        message = (
            f"{part} holds out {rows:,} of {len(usable):,} usable rows, far from its share of {share:g} ({wanted:,.1f} rows): rows that "
            f"share an image stay together, which makes {len(groups):,} groups, the largest of {max(map(len, groups)):,} rows"
        )
        if self.data.split is not None and self.data.split.stratify:
            message += ", and stratify rounds in each category"
        return f"{message}; give {part} sources of its own, or another share"

    def check(self, *, lenient: bool) -> None:
        """Raises `DataError` as the policy for bad rows tells (not if `lenient`), and if no row is left."""
        if lenient:
            return
        data = self.data
        capped = self.bad > data.max_bad_rows
        for record in self.records(BAD):
            message = record["message"]
            overlong = record["kind"] == "overlong"
            if overlong:
                message += " (overlong: drop, split or trim)"
            elif capped and data.on_bad_row != "fail":
                message = f"{self.bad} bad rows, more than {data.max_bad_rows} (data.max_bad_rows); the first: {message}"
            # With `overlong: fail` a long row stops the run, whatever is done with bad ones.
            if data.on_bad_row == "fail" or capped or overlong:
                raise DataError(
                    message, source=record["source"], row=record["row"], kind=record["kind"]
                )
        if not len(self.places(self.part)):
            rows = len(self.column("status"))
            what = "train on" if self.part == "train" else "score"
            first = next(self.reasons(1), "")
            message = f"no row is left to {what}, of {rows:,}" + (
                f"; the first: {first}" if first else ""
            )
            raise DataError(message, source=f"data.{self.part}")
        for part in PARTS[1:]:
            if problem := self.split_problem(part):
                raise DataError(problem, source="data.split", kind="split")
