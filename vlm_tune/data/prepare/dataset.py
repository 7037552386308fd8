"""Prepared rows as training reads them: units of examples by index, and a record of every row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
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
from vlm_tune.data.prepare.duplicates import bytes_digest
from vlm_tune.data.prepare.job import Job, task_names
from vlm_tune.data.prepare.merge_shards import PARTS, joined_rows
from vlm_tune.data.prepare.worker import BAD, LEFT_OUT, OK, content_hash, files_changed
from vlm_tune.data.sources.registry import read_all
from vlm_tune.data.types import Conversation, Example, Media, Video
from vlm_tune.errors import DataError
from vlm_tune.files import is_intact

if TYPE_CHECKING:
    import pyarrow as pa

Group = list[Example]
"""The examples of one unit of a batch: those of a row, or of all rows of an image."""


class Prepared:
    """The prepared rows of a part in a folder; examples are memory-mapped and read on access."""

    def __init__(self, folder: Path, job: Job) -> None:
        """Opens a folder that `finish` wrote for the job; `open` checks it first."""
        self.folder = folder
        self.data = job.data
        self.sources = list(job.sources)
        self.layout = job.layout
        self.part = job.part
        self.readers = job.readers
        self._open(self.media_rows)

    def _open(self, rows: Iterable[MediaRow]) -> None:
        """Opens the examples, whose media are those of `rows`, and the units."""
        self.store = ExampleStore(self.folder / "examples.arrow", [row.media for row in rows])
        units = np.load(self.folder / "units.npz")
        self.starts: np.ndarray = units["starts"]
        self.unit_sources: np.ndarray = units["source"]

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the open files, and what reads rows: a loader process needs the examples."""
        names = ("folder", "data", "sources", "layout", "part")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, readers=())
        self._open(self._media_rows())

    @cached_property
    def media_rows(self) -> list[MediaRow]:
        """The distinct media items of all rows, with the properties of their images."""
        return list(self._media_rows())

    def _media_rows(self) -> Iterator[MediaRow]:
        for batch in read_batches(self.folder / "media.arrow"):
            yield from media_rows(batch, self.folder)

    @classmethod
    def open(cls, folder: Path, job: Job) -> Prepared | None:
        """Opens the prepared rows in `folder`.

        Returns None if there are none, if they are damaged, or if an image that they depend on was
        changed, removed or added since.
        """
        return cls(folder, job) if is_intact(folder) and not files_changed(folder) else None

    # --- units ---

    def __len__(self) -> int:
        return len(self.starts) - 1

    def unit(self, number: int) -> Group:
        """Reads the examples of a unit."""
        return [self.store[place] for place in range(self.starts[number], self.starts[number + 1])]

    @cached_property
    def unit_lengths(self) -> np.ndarray:
        """Input tokens of each unit's longest example, and of all of them: int64[units, 2]."""
        if not len(self):
            return np.empty((0, 2), dtype=np.int64)
        lengths = self.store.lengths.astype(np.int64)
        first = self.starts[:-1]
        return np.column_stack(
            [np.maximum.reduceat(lengths, first), np.add.reduceat(lengths, first)]
        )

    def unit_costs(self, image_cost: float) -> np.ndarray:
        """The cost of each unit's forward and backward pass, in input tokens: float64[units].

        An image costs as much as `image_cost` tokens.
        """
        tokens = self.unit_lengths[:, 1].astype(np.float64)
        if not image_cost or not len(self):
            return tokens
        return tokens + image_cost * np.add.reduceat(
            self.store.media_counts.astype(np.float64), self.starts[:-1]
        )

    @property
    def questions(self) -> int:
        """The number of question-answer pairs of all units."""
        return int(self.store.questions.sum())

    @cached_property
    def used_media(self) -> list[MediaRow]:
        """The distinct media items that the examples use, with the properties of their images."""
        shown = np.zeros(len(self.media_rows), dtype=bool)
        shown[self.store.shown] = True
        return [row for row, used in zip(self.media_rows, shown.tolist(), strict=True) if used]

    @cached_property
    def media(self) -> list[Media]:
        """The distinct media items that the examples use."""
        return [row.media for row in self.used_media]

    # --- rows ---

    @cached_property
    def row_batches(self) -> list[pa.RecordBatch]:
        """The records of all rows in order: `RowRecord`, with `part` and the source's `number`."""
        return read_batches(self.folder / "rows.arrow")

    @property
    def joins(self) -> bool:
        """Whether rows of an image are joined into one example, or examples are packed."""
        joined = int(self.column("examples")[self.places(self.part)].sum())
        return self.data.packing or joined > len(self.store.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest example trained on, before the examples of an image are joined."""
        return int(self.column("longest")[self.places(self.part)].max(initial=0))

    def column(self, name: str) -> np.ndarray:
        """A numeric column of the row records."""
        arrays = [numpy_view(batch.column(name)) for batch in self.row_batches]
        return np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)

    def values(self, name: str, places: np.ndarray) -> list[Any]:
        """The values of a column for the rows at ascending `places`."""
        values = []
        first = 0
        for batch in self.row_batches:
            start, end = np.searchsorted(places, [first, first + batch.num_rows])
            if end > start:
                values += (
                    batch.column(name).take(arrow_indices(places[start:end] - first)).to_pylist()
                )
            first += batch.num_rows
        return values

    @cached_property
    def shown(self) -> tuple[np.ndarray, np.ndarray]:
        """Media indices of all rows, int32[all], and each row's offset in them, int64[rows + 1]."""
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
        """Yields the records of rows with one of the statuses."""
        for batch in self.row_batches:
            for place in np.flatnonzero(
                np.isin(numpy_view(batch.column("status")), statuses)
            ).tolist():
                yield {name: batch.column(name)[place].as_py() for name in batch.schema.names}

    @cached_property
    def bad(self) -> int:
        """The number of unusable rows."""
        return int((self.column("status") == BAD).sum())

    @property
    def left_out(self) -> dict[str, int]:
        """The number of rows not trained on, by kind; `overlong` counts examples."""
        counts = Counter(
            record["kind"] for record in self.records(BAD, LEFT_OUT) if record["kind"] != "overlong"
        )
        overlong = int(self.column("overlong").sum())
        return dict(sorted(counts.items())) | ({"overlong": overlong} if overlong else {})

    def reasons(self, most: int) -> Iterator[str]:
        """Yields messages about the first `most` rows that are left out."""
        for number, record in enumerate(self.records(BAD, LEFT_OUT)):
            if number == most:
                return
            yield f"{record['source']}, row {record['row']}: {record['message']}"

    def places(self, part: str) -> np.ndarray:
        """The indices of a part's usable rows.

        `part` is this part, or one that `data.split` holds out of train. Rows to
        score whose prompt is over `max_length` are not usable.
        """
        if part == self.part:
            return np.flatnonzero((self.column("status") == OK) & (self.column("part") == 0))
        places = self._held_out(part)
        return places[self.prompts_fit(places)]

    def long_prompts(self, part: str) -> np.ndarray:
        """The indices of rows held out for a part whose prompt is over `max_length`."""
        places = self._held_out(part)
        return places[~self.prompts_fit(places)]

    def prompts_fit(self, places: np.ndarray) -> np.ndarray:
        """bool[rows]: true where the prompt, without the last answer, fits `max_length`."""
        return self.column("prompt")[places] <= self.data.max_length

    def _held_out(self, part: str) -> np.ndarray:
        return np.flatnonzero(
            (self.column("status") == OK) & (self.column("part") == PARTS.index(part))
        )

    def conversations(self, places: np.ndarray) -> Iterator[Conversation]:
        """Yields the rows at ascending `places`, read again from their sources.

        Images that came inside rows are read from this folder. Raises `DataError` if a source has
        changed.
        """
        digests = dict(zip(places.tolist(), self.values("digest", places), strict=True))
        starts = np.searchsorted(self.column("number"), np.arange(len(self.sources) + 1)).tolist()
        for reader, name, first, end in zip(
            self.readers, task_names(self.sources), starts, starts[1:], strict=False
        ):
            wanted = {place for place in digests if first <= place < end}
            for place, row in enumerate(read_all([reader]) if wanted else (), first):
                if place not in wanted:
                    continue
                if not isinstance(row, Conversation) or content_hash(row) != digests[place]:
                    message = (
                        "the row has changed since it was prepared: the source was changed "
                        "meanwhile; start again"
                    )
                    raise DataError(message, source=row.source, row=row.row)
                yield replace(self._with_stored_images(row), source_name=name)
                wanted.remove(place)
                if not wanted:
                    break

    def _with_stored_images(self, row: Conversation) -> Conversation:
        """The row with each image that came as bytes replaced by its stored copy."""
        if not any(isinstance(item.source, bytes) for item in row.media):
            return row
        messages = [
            replace(message, parts=tuple(map(self._stored, message.parts)))
            for message in row.messages
        ]
        return replace(row, messages=tuple(messages))

    def _stored(self, part: str | Media) -> str | Media:
        return part if isinstance(part, str) else self._stored_item(part)

    def _stored_item(self, item: Media) -> Media:
        if isinstance(item.source, Video):
            return replace(item, source=item.source.with_frames(self._stored_item))
        if not isinstance(item.source, bytes):
            return item
        return self._media_by_bytes[bytes_digest(item.source)]

    @cached_property
    def _media_by_bytes(self) -> dict[bytes, Media]:
        """Whole images by the digest of their bytes."""
        whole = (row for row in self.media_rows if row.media.tile is None)
        return {row.info.sha256: replace(row.media, grid=None) for row in whole}

    def split_problem(self, part: str) -> str | None:
        """Message about a held-out part that is empty or far from its share.

        Returns None if there is no such problem, or if `data.split` does not hold out this part.
        """
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
            f"{part} holds out {rows:,} of {len(usable):,} usable rows, far from its share of "
            f"{share:g} ({wanted:,.1f} rows): rows that share an image stay together, which makes "
            f"{len(groups):,} groups, the largest of {max(map(len, groups)):,} rows"
        )
        if self.data.split is not None and self.data.split.stratify:
            message += ", and stratify rounds in each category"
        return f"{message}; give {part} sources of its own, or another share"

    def check(self, *, lenient: bool) -> None:
        """Checks the rows against the policy for bad rows; does nothing if `lenient`.

        Raises `DataError` for bad rows that the policy does not allow, if no row is left, and for a
        held-out part that is far from its share.
        """
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
                message = (
                    f"{self.bad} bad rows, more than {data.max_bad_rows} (data.max_bad_rows); "
                    f"the first: {message}"
                )
            # With `overlong: fail` a long row stops the run, whatever the policy for bad rows.
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
