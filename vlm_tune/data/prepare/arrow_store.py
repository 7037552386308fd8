"""Prepared examples on disk: memory-mapped Arrow files, so that reading a row copies nothing.

An example's media are indices into a table of distinct media. Encoded bytes that came inside rows
are in one file beside the table.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_tune.data.prepare.duplicates import ImageInfo
from vlm_tune.data.types import ANSWER_KINDS, Example, Media, PatchGrid, Slice, Tile, Video

if TYPE_CHECKING:
    import pyarrow as pa

LISTS = ("input_ids", "labels", "slots", "media", "positions", "ends", "label_samples", "answers")
"""Columns of int32 lists.

`slots` holds a pair (start, number) for each run of image slots, `media` holds indices of the media
table.
"""


@dataclass(frozen=True)
class MediaRow:
    """One distinct media item: its location, and the properties of its whole image."""

    media: Media
    info: ImageInfo


def numpy_view(array: pa.Array) -> np.ndarray:
    """The values of an Arrow array without nulls, not copied.

    `Array.to_numpy` would import pandas, which takes a second and 24 MB.
    """
    return np.from_dlpack(array)


def arrow_indices(places: np.ndarray) -> pa.Array:
    """Indices as an int64 Arrow array for `take`, without pandas, which `pyarrow.array` imports."""
    import pyarrow as pa

    whole = np.ascontiguousarray(places, np.int64)
    return pa.Array.from_buffers(pa.int64(), len(whole), [None, pa.py_buffer(whole)])


def _lists(values: Sequence[np.ndarray | Sequence[int]]) -> pa.ListArray:
    import pyarrow as pa

    offsets = np.cumsum([0, *map(len, values)], dtype=np.int64).astype(np.int32)
    flat = (
        np.concatenate([np.asarray(value, dtype=np.int32) for value in values])
        if len(values)
        else np.empty(0, np.int32)
    )
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(flat, pa.int32()))


def _slots(image_mask: np.ndarray) -> np.ndarray:
    """(start, number) of each run of image slots, as a flat array."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], image_mask.astype(np.int8), [0]])))
    return np.column_stack([edges[::2], edges[1::2] - edges[::2]]).reshape(-1)


def example_batch(examples: Sequence[Example], media: Sequence[Any]) -> pa.RecordBatch:
    """Converts examples to one record batch; `media` are the indices of each one's media.

    Packed rows are not stored, as they are built again in each epoch.
    """
    import pyarrow as pa

    nothing = np.empty(0, np.int32)
    optional = {
        "positions": [example.positions for example in examples],
        "ends": [example.visible_until for example in examples],
        "label_samples": [example.label_samples for example in examples],
        "answers": [example.answers for example in examples],
    }
    columns = {
        "id": pa.array([example.id for example in examples], pa.string()),
        "category": pa.array([example.category for example in examples], pa.string()),
        "questions": pa.array([example.questions for example in examples], pa.int32()),
        "input_ids": _lists([example.input_ids for example in examples]),
        "labels": _lists([example.labels for example in examples]),
        "slots": _lists([_slots(example.image_mask) for example in examples]),
        "media": _lists(media),
        **{
            name: _lists([nothing if array is None else array for array in arrays])
            for name, arrays in optional.items()
        },
    }
    return pa.RecordBatch.from_pydict(columns)


def write_batches(
    path: Path, batches: Iterable[pa.RecordBatch], schema: pa.Schema | None = None
) -> None:
    """Writes an Arrow file; without batches, an empty one of `schema`."""
    import pyarrow as pa

    writer = None
    with pa.OSFile(str(path), "wb") as sink:
        for batch in batches:
            writer = writer or pa.ipc.new_file(sink, batch.schema)
            writer.write_batch(batch)
        if writer is None and schema is not None:
            writer = pa.ipc.new_file(sink, schema)
        if writer is not None:
            writer.close()


def read_batches(path: Path) -> list[pa.RecordBatch]:
    """Memory-maps an Arrow file and returns its record batches."""
    import pyarrow as pa

    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return [reader.get_batch(number) for number in range(reader.num_record_batches)]


class _Columns:
    """Numpy views of one record batch."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.ids = batch.column("id")
        self.categories = batch.column("category")
        self.questions = numpy_view(batch.column("questions"))
        lists: dict[str, Any] = {name: batch.column(name) for name in LISTS}
        self.offsets = {name: numpy_view(column.offsets) for name, column in lists.items()}
        self.values = {name: numpy_view(column.values) for name, column in lists.items()}
        self.empty = {name for name, values in self.values.items() if not len(values)}

    def list(self, name: str, row: int) -> np.ndarray:
        offsets = self.offsets[name]
        return self.values[name][offsets[row] : offsets[row + 1]]

    def optional(self, name: str, row: int) -> np.ndarray | None:
        """The list of a row, None if it is empty. Most batches leave whole columns empty."""
        if name in self.empty:
            return None
        values = self.list(name, row)
        return values if len(values) else None


class ExampleStore:
    """The examples of an Arrow file by index, read on access."""

    def __init__(self, path: Path, media: Sequence[Media]) -> None:
        self.path = path
        self.media = media
        self._batches = read_batches(path)
        self._first = np.cumsum([0, *(batch.num_rows for batch in self._batches)]).tolist()
        self._columns: dict[int, _Columns] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the open file out: each loader process opens it again."""
        return {"path": self.path, "media": self.media}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __len__(self) -> int:
        return self._first[-1]

    def _locate(self, number: int) -> tuple[_Columns, int]:
        place = bisect_right(self._first, number) - 1
        columns = self._columns.get(place)
        if columns is None:
            columns = self._columns[place] = _Columns(self._batches[place])
        return columns, number - self._first[place]

    def __getitem__(self, number: int) -> Example:
        columns, row = self._locate(number)
        ids = columns.list("input_ids", row)
        mask = np.zeros(len(ids), dtype=bool)
        for start, size in columns.list("slots", row).reshape(-1, 2).tolist():
            mask[start : start + size] = True
        return Example(
            id=columns.ids[row].as_py(),
            input_ids=ids,
            labels=columns.list("labels", row),
            image_mask=mask,
            media=tuple(self.media[item] for item in columns.list("media", row).tolist()),
            category=columns.categories[row].as_py(),
            positions=columns.optional("positions", row),
            visible_until=columns.optional("ends", row),
            label_samples=columns.optional("label_samples", row),
            questions=int(columns.questions[row]),
            answers=columns.optional("answers", row),
        )

    def media_of(self, number: int) -> np.ndarray:
        """The indices of an example's media."""
        columns, row = self._locate(number)
        return columns.list("media", row)

    def _every(self, value: Any) -> np.ndarray:
        arrays = [
            value(self._locate(first)[0])
            for first, batch in zip(self._first, self._batches, strict=False)
            if batch.num_rows
        ]
        return np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)

    @cached_property
    def lengths(self) -> np.ndarray:
        """The number of input tokens of each example."""
        return self._every(lambda columns: np.diff(columns.offsets["input_ids"]))

    @cached_property
    def label_lengths(self) -> np.ndarray:
        """The number of label positions of each example."""
        return self._every(lambda columns: np.diff(columns.offsets["labels"]))

    @cached_property
    def has_answers(self) -> bool:
        """Whether an example has answers that are judged."""
        lengths = self._every(lambda columns: np.diff(columns.offsets["answers"]))
        return bool(lengths.any())

    @cached_property
    def judged_answers(self) -> np.ndarray:
        """The number of answers of each of `ANSWER_KINDS`, in rows of preferences."""
        counts = np.zeros(ANSWER_KINDS, dtype=np.int64)
        for first, batch in zip(self._first, self._batches, strict=False):
            if not batch.num_rows:
                continue
            columns = self._locate(first)[0]
            answers = columns.values["answers"].astype(np.int64)
            rows = np.repeat(np.arange(batch.num_rows), np.diff(columns.offsets["answers"]))
            # Every token of an answer has its number; each answer counts once.
            distinct = np.unique(np.stack([rows, answers])[:, answers >= 0], axis=1)[1]
            counts += np.bincount(distinct % ANSWER_KINDS, minlength=ANSWER_KINDS)
        return counts

    @property
    def media_counts(self) -> np.ndarray:
        """The number of media items of each example."""
        return self._every(lambda columns: np.diff(columns.offsets["media"]))

    @property
    def shown(self) -> np.ndarray:
        """The media indices of all examples, concatenated."""
        return self._every(lambda columns: columns.values["media"])

    @cached_property
    def questions(self) -> np.ndarray:
        """The number of question-answer pairs of each example."""
        return self._every(lambda columns: columns.questions)


BLOB = "media.bin"
"""File of encoded images that came inside rows, concatenated; beside their media table."""


def media_batch(rows: Sequence[MediaRow], folder: Path) -> pa.RecordBatch:
    """The media table of `folder`; items given as bytes must be slices of its blob by now."""
    import pyarrow as pa

    places = [_place(row.media, folder) for row in rows]
    videos = [row.media.source for row in rows]
    tiles = [row.media.tile for row in rows]
    return pa.RecordBatch.from_pydict(
        {
            "path": pa.array([path for path, _, _ in places], pa.binary()),
            "offset": pa.array([offset for _, offset, _ in places], pa.int64()),
            "size": pa.array([size for _, _, size in places], pa.int64()),
            "tile": _lists([() if tile is None else _tile_numbers(tile) for tile in tiles]),
            "grid": _lists(
                [
                    () if grid is None else (grid.rows, grid.columns, grid.merge)
                    for grid in (row.media.grid for row in rows)
                ]
            ),
            "modality": pa.array([row.media.modality for row in rows], pa.string()),
            "of_video": pa.array([row.media.of_video for row in rows], pa.bool_()),
            "video": pa.array([_video_record(each, folder) for each in videos], _video_type()),
            "sha256": pa.array([row.info.sha256 for row in rows], pa.binary()),
            "width": pa.array([row.info.width for row in rows], pa.int32()),
            "height": pa.array([row.info.height for row in rows], pa.int32()),
            "format": pa.array([row.info.format for row in rows], pa.string()),
            "dhash": pa.array([row.info.dhash for row in rows], pa.uint64()),
            "thumbnail": pa.array([row.info.thumbnail for row in rows], pa.binary()),
        }
    )


def _place(media: Media, folder: Path) -> tuple[bytes, int, int]:
    """The path, offset and size of an item's bytes, the last two of a whole file negative.

    A video has no place, but its frames have.
    """
    source = media.source
    assert not isinstance(source, bytes)
    if isinstance(source, Video):
        return b"", -1, -1
    if isinstance(source, Path):
        return os.fsencode(source), -1, -1
    # Only the blob's name is stored, so that the folder can be moved.
    return (
        os.fsencode(BLOB if source.path == folder / BLOB else source.path),
        source.offset,
        source.size,
    )


def _source(path: bytes, offset: int, size: int, folder: Path) -> Path | Slice:
    """The file or slice of `_place`."""
    # A path may hold bytes that are not valid text.
    name = os.fsdecode(path)
    file = folder / BLOB if name == BLOB else Path(name)
    return file if offset < 0 else Slice(file, offset, size)


def _video_type() -> pa.DataType:
    """The Arrow type of a video: its fields, with the places of its frames."""
    import pyarrow as pa

    frame = pa.struct([("path", pa.binary()), ("offset", pa.int64()), ("size", pa.int64())])
    return pa.struct(
        [
            ("frames", pa.list_(frame)),
            ("places", pa.list_(pa.int64())),
            ("count", pa.int64()),
            ("fps", pa.float64()),
            ("seconds", pa.list_(pa.float64())),
        ]
    )


def _video_record(source: object, folder: Path) -> dict[str, Any] | None:
    """A video as a value of `_video_type`; None for any other source."""
    if not isinstance(source, Video):
        return None
    names = ("path", "offset", "size")
    frames = [dict(zip(names, _place(each, folder), strict=True)) for each in source.frames]
    return {
        "frames": frames,
        "places": source.places,
        "count": source.count,
        "fps": source.fps,
        "seconds": source.seconds,
    }


def _video(record: dict[str, Any], folder: Path) -> Video:
    """The video of `_video_record`."""
    return Video(
        tuple(Media(_source(**frame, folder=folder), of_video=True) for frame in record["frames"]),
        tuple(record["places"]),
        record["count"],
        record["fps"],
        tuple(record["seconds"]),
    )


def _tile_numbers(tile: Tile) -> list[int]:
    """A tile's fields as numbers, with 0 for what it lacks."""
    width, height = tile.size or (0, 0)
    place = [tile.column, tile.row, tile.columns, tile.rows]
    return [*place, width, height, tile.most or 0, int(tile.ended)]


def _tile(numbers: Sequence[int]) -> Tile | None:
    """The tile of `_tile_numbers`; None for no numbers."""
    if not numbers:
        return None
    *place, width, height, most, ended = numbers
    size = (width, height) if width else None
    return Tile(*place, size=size, most=most or None, ended=bool(ended))


def media_rows(batch: pa.RecordBatch, folder: Path) -> list[MediaRow]:
    """Reads the rows of the media table of `folder`."""

    def media(row: dict[str, Any]) -> Media:
        if row["video"] is not None:
            video = _video(row["video"], folder)
            return Media(video, row["modality"], of_video=row["of_video"])
        source = _source(row["path"], row["offset"], row["size"], folder)
        grid = PatchGrid(*row["grid"]) if row["grid"] else None
        return Media(source, row["modality"], _tile(row["tile"]), grid, row["of_video"])

    names = [field.name for field in fields(ImageInfo)]
    return [
        MediaRow(media(row), ImageInfo(**{name: row[name] for name in names}))
        for row in batch.to_pylist()
    ]
