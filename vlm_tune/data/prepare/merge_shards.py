"""The last step of preparing: merges the shards of a part into one folder.

Duplicates and held-out rows are marked, and examples are written in the order of their units.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_tune.config.data import Source, Split
from vlm_tune.data.packing import branch_layout
from vlm_tune.data.prepare.arrow_store import (
    BLOB,
    ExampleStore,
    MediaRow,
    example_batch,
    media_batch,
    media_rows,
    read_batches,
    write_batches,
)
from vlm_tune.data.prepare.duplicates import look_alikes
from vlm_tune.data.prepare.job import Job
from vlm_tune.data.prepare.worker import LEFT_OUT, OK, read_stamps, write_stamps
from vlm_tune.data.types import Example, Media, Slice, Video
from vlm_tune.errors import DataError
from vlm_tune.files import write_checksums

if TYPE_CHECKING:
    import pyarrow as pa

PARTS = ("train", "validation", "test")
BATCH = 2048
"""The number of examples in one record batch."""


def finish(partial: Path, folder: Path, job: Job) -> None:
    """Writes `folder` from the shards in `partial`, and removes `partial`."""
    data = job.data
    temporary = folder.with_suffix(f".tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    shards = [
        (number, partial / name)
        for number, names in enumerate(json.loads((partial / "shards.json").read_text()))
        for name in names
    ]
    media = _Media(temporary, folder)
    rows = _Rows(shards, job.sources, media)
    if data.clean.duplicates != "keep":
        _leave_out_duplicates(rows, media.rows, perceptual=data.clean.duplicates == "perceptual")
    if job.parts is not None:
        _hold_out_as(rows, job.parts)
    elif data.split is not None:
        _hold_out(rows, media.rows, data.split, job.seed)
    media.close()
    write_batches(temporary / "media.arrow", [media_batch(media.rows, folder)])
    write_batches(temporary / "rows.arrow", rows.batches())
    grouped = data.group == "image"
    plain = temporary / ("ungrouped.arrow" if grouped else "examples.arrow")
    write_batches(plain, _kept_examples(shards, rows, media), example_batch([], []).schema)
    unit_source = rows.example_sources()
    counts = [1] * len(unit_source)
    if grouped:
        store = ExampleStore(plain, [row.media for row in media.rows])
        units = _units(store)
        counts = _write_units(
            store, units, temporary / "examples.arrow", job.layout, data.row_length
        )
        unit_source = unit_source[np.array([unit[0] for unit in units], dtype=np.int64)]
        plain.unlink()
    write_stamps(
        temporary,
        {path: stamp for _, shard in shards for path, stamp in read_stamps(shard).items()},
    )
    np.savez(temporary / "units.npz", starts=np.cumsum([0, *counts]), source=unit_source)
    write_checksums(temporary)
    temporary.rename(folder)
    shutil.rmtree(partial)


class _Media:
    """The distinct media of all shards; equal bytes are one item, even from different files."""

    def __init__(self, temporary: Path, folder: Path) -> None:
        self.rows: list[MediaRow] = []
        self._numbers: dict[Any, int] = {}
        self._blob = (temporary / BLOB).open("wb")
        self._folder = folder
        self._size = 0
        self._slices: dict[Slice, Slice] = {}

    def numbers(self, shard: Path) -> np.ndarray:
        """Adds a shard's items and returns their indices: int32[items]."""
        rows = [
            row for batch in read_batches(shard / "media.arrow") for row in media_rows(batch, shard)
        ]
        return np.array([self._add(row, shard) for row in rows], dtype=np.int32)

    def _add(self, row: MediaRow, shard: Path) -> int:
        key = (row.info.sha256, row.media.tile, row.media.grid)
        index = self._numbers.get(key)
        if index is None:
            index = self._numbers[key] = len(self.rows)
            self.rows.append(replace(row, media=self._copied(row.media, shard)))
        return index

    def _copied(self, media: Media, shard: Path) -> Media:
        """The item with its bytes in this blob, each part of the shard's once."""
        source = media.source
        if isinstance(source, Video):
            return replace(media, source=source.with_frames(lambda each: self._copied(each, shard)))
        if not isinstance(source, Slice) or source.path != shard / BLOB:
            return media
        copy = self._slices.get(source)
        if copy is None:
            copy = self._slices[source] = Slice(self._folder / BLOB, self._size, source.size)
            self._blob.write(source.read_bytes())
            self._size += source.size
        return replace(media, source=copy)

    def close(self) -> None:
        self._blob.close()


class _Rows:
    """The records of all shards as arrays over rows; only the first `limit` rows of each source."""

    def __init__(
        self, shards: Sequence[tuple[int, Path]], sources: Sequence[Source], media: _Media
    ) -> None:
        taken: Counter[int] = Counter()
        self._batches: list[pa.RecordBatch] = []
        self.media_numbers: list[np.ndarray] = []
        source: list[np.ndarray] = []
        shown = [np.empty(0, np.int32)]
        sizes = [np.empty(0, np.int64)]
        for number, shard in shards:
            (batch,) = read_batches(shard / "rows.arrow")
            limit = sources[number].limit
            if limit is not None:
                batch = batch.slice(0, max(limit - taken[number], 0))
            taken[number] += batch.num_rows
            numbers = media.numbers(shard)
            self.media_numbers.append(numbers)
            listed = batch.column("images")
            flat = listed.values.to_numpy()
            offsets = listed.offsets.to_numpy()
            shown.append(numbers[flat[offsets[0] : offsets[-1]]])
            sizes.append(np.diff(offsets))
            self._batches.append(batch)
            source.append(np.full(batch.num_rows, number, dtype=np.int16))
        self._shown = np.concatenate(shown)
        self._shown_from = np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int64)
        self.source = np.concatenate(source) if source else np.empty(0, np.int16)
        self.status, self.text, self.examples = (
            self._column(name).copy() for name in ("status", "text", "examples")
        )
        self.part = np.zeros(len(self.source), dtype=np.int8)
        self.twin = np.full(len(self.source), -1, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.source)

    def _column(self, name: str) -> np.ndarray:
        arrays = [batch.column(name).to_numpy() for batch in self._batches]
        return np.concatenate(arrays) if arrays else np.empty(0, np.int64)

    @property
    def trained_on(self) -> np.ndarray:
        """bool[rows]: true where the examples of a row are trained on."""
        return (self.status == OK) & (self.part == 0)

    def images(self, row: int) -> np.ndarray:
        """The media indices of a row's images."""
        return self._shown[self._shown_from[row] : self._shown_from[row + 1]]

    def categories(self) -> list[str]:
        return [value for batch in self._batches for value in batch.column("category").to_pylist()]

    def example_sources(self) -> np.ndarray:
        """The source of each example that is trained on, in order."""
        return np.repeat(self.source[self.trained_on], self.examples[self.trained_on])

    def spans(self) -> list[tuple[int, int]]:
        """The range (start, end) of each shard's rows."""
        edges = np.cumsum([0, *(batch.num_rows for batch in self._batches)]).tolist()
        return list(pairwise(edges))

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yields the records with each row's part and, for duplicates, the row they repeat."""
        import pyarrow as pa

        for batch, (start, end) in zip(self._batches, self.spans(), strict=True):
            columns = {name: batch.column(name) for name in batch.schema.names if name != "images"}
            twins = self.twin[start:end]
            if (twins >= 0).any():
                repeated = [
                    f"repeats row {self._row(twin)}" if twin >= 0 else old
                    for twin, old in zip(twins, columns["message"].to_pylist(), strict=True)
                ]
                kinds = [
                    "duplicate" if twin >= 0 else old
                    for twin, old in zip(twins, columns["kind"].to_pylist(), strict=True)
                ]
                columns |= {
                    "message": pa.array(repeated, pa.string()),
                    "kind": pa.array(kinds, pa.string()),
                }
            columns["status"] = pa.array(self.status[start:end], pa.int8())
            columns["part"] = pa.array(self.part[start:end], pa.int8())
            columns["number"] = pa.array(self.source[start:end], pa.int16())
            offsets = self._shown_from[start : end + 1]
            columns["images"] = pa.ListArray.from_arrays(
                pa.array(offsets - offsets[0], pa.int32()),
                pa.array(self._shown[offsets[0] : offsets[-1]], pa.int32()),
            )
            yield pa.RecordBatch.from_pydict(columns)

    def _row(self, place: int) -> str:
        starts = [start for start, _ in self.spans()]
        number = bisect_right(starts, place) - 1
        batch = self._batches[number]
        index = int(place) - starts[number]
        return f"{batch.column('row')[index].as_py()} of {batch.column('source')[index].as_py()}"


# --- cleaning and splitting ---


def _leave_out_duplicates(rows: _Rows, media: Sequence[MediaRow], *, perceptual: bool) -> None:
    """Leaves out all but the first of rows with equal text and equal (or similar) images."""
    looks = look_alikes([row.info for row in media]) if perceptual else np.arange(len(media))
    first: dict[tuple[int, bytes], int] = {}
    for place in np.flatnonzero(rows.status == OK):
        key = (int(rows.text[place]), looks[rows.images(int(place))].tobytes())
        earlier = first.setdefault(key, int(place))
        if earlier != place:
            rows.status[place] = LEFT_OUT
            rows.twin[place] = earlier


def _hold_out(rows: _Rows, media: Sequence[MediaRow], split: Split, seed: int) -> None:
    """Assigns rows to parts.

    Rows that share an image, directly or through others, form a group and get the same part. Groups
    are ordered by a hash of (seed, image bytes), so the assignment does not depend on
    the order of rows.
    """
    families = joined_rows(np.flatnonzero(rows.status == OK).tolist(), rows.images, len(media))
    categories = rows.categories() if split.stratify else None
    strata: dict[str, list[list[int]]] = defaultdict(list)
    for members in families:
        stratum = (
            Counter(categories[row] for row in members).most_common(1)[0][0] if categories else ""
        )
        strata[stratum].append(members)
    for stratum in strata.values():
        stratum.sort(key=lambda members: _draw(rows, media, members, seed))
        total = sum(map(len, stratum))
        taken = 0
        bounds = np.cumsum([split.test * total, split.validation * total])
        for members in stratum:
            middle = taken + len(members) / 2
            part = 2 if middle < bounds[0] else 1 if middle < bounds[1] else 0
            rows.part[members] = part
            taken += len(members)


def _hold_out_as(rows: _Rows, parts: np.ndarray) -> None:
    """Assigns rows to the parts decided when they were read without few-shot examples."""
    if len(parts) != len(rows):
        message = (
            f"{len(parts):,} rows, then {len(rows):,}: "
            "a source was changed while it was read; start again"
        )
        raise DataError(message, source="data.train")
    rows.part[:] = np.where(rows.status == OK, parts, 0)


def joined_rows(
    rows: Sequence[int], images_of: Callable[[int], np.ndarray], images: int
) -> list[list[int]]:
    """Groups rows that share an image, directly or through other rows (union-find).

    Args:
        rows: The rows to group.
        images_of: Returns the media indices of a row's images.
        images: The number of media items.
    """
    parent = list(range(images))

    def root(image: int) -> int:
        while parent[image] != image:
            parent[image] = image = parent[parent[image]]
        return image

    for row in rows:
        for image in images_of(row)[1:]:
            parent[root(int(image))] = root(int(images_of(row)[0]))
    groups: dict[int, list[int]] = defaultdict(list)
    alone = []
    for row in rows:
        if len(images_of(row)):
            groups[root(int(images_of(row)[0]))].append(row)
        else:
            alone.append([row])
    return [*groups.values(), *alone]


def _draw(rows: _Rows, media: Sequence[MediaRow], members: Sequence[int], seed: int) -> bytes:
    shown = min(
        (media[image].info.sha256 for row in members for image in rows.images(row)), default=b""
    )
    named = shown or min(int(rows.text[row]) for row in members).to_bytes(8, "little")
    return hashlib.blake2b(seed.to_bytes(8, "little") + named, digest_size=16).digest()


# --- examples ---


def _kept_examples(
    shards: Sequence[tuple[int, Path]], rows: _Rows, media: _Media
) -> Iterator[pa.RecordBatch]:
    """Yields the shards' examples of rows trained on, with media indices of the merged table."""
    import pyarrow as pa

    for (_, shard), numbers, (start, end) in zip(
        shards, rows.media_numbers, rows.spans(), strict=True
    ):
        (batch,) = read_batches(shard / "examples.arrow")
        counts = rows.examples[start:end]
        chosen = np.flatnonzero(np.repeat(rows.trained_on[start:end], counts))
        if len(chosen) < batch.num_rows:
            batch = batch.take(pa.array(chosen))
        if not batch.num_rows:
            continue
        listed = batch.column("media")
        renamed = pa.ListArray.from_arrays(
            listed.offsets, pa.array(numbers[listed.values.to_numpy()], pa.int32())
        )
        yield batch.set_column(batch.schema.get_field_index("media"), "media", renamed)


def _units(store: ExampleStore) -> list[list[int]]:
    """Groups examples by their media, in order of first use; each without media is one unit."""
    units: dict[bytes | int, list[int]] = {}
    for number in range(len(store)):
        media = store.media_of(number)
        units.setdefault(media.tobytes() if len(media) else number, []).append(number)
    return list(units.values())


def _write_units(
    store: ExampleStore, units: Sequence[Sequence[int]], path: Path, layout: str, row_length: int
) -> list[int]:
    """Writes the units' examples in order, those of a unit joined for a decoder.

    Returns the number of examples of each unit.
    """
    counts: list[int] = []

    def batches() -> Iterator[pa.RecordBatch]:
        examples: list[Example] = []
        media: list[np.ndarray] = []
        for unit in units:
            unit_examples = [store[number] for number in unit]
            joined = (
                branch_layout(unit_examples, row_length) if layout == "causal" else unit_examples
            )
            counts.append(len(joined))
            examples += joined
            media += [store.media_of(unit[0])] * len(joined)
            if len(examples) >= BATCH:
                yield example_batch(examples, media)
                examples = []
                media = []
        if examples:
            yield example_batch(examples, media)

    write_batches(path, batches(), example_batch([], []).schema)
    return counts
