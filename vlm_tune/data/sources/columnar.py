"""Rows in columns: Parquet and Arrow files, and data sets of the datasets library."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_tune.compat import dataset_fingerprint
from vlm_tune.config.data import DatasetSource
from vlm_tune.data.sources.base import CHUNK_ROWS, Chunk, StoredRow, digest
from vlm_tune.data.sources.json_csv import Stretch
from vlm_tune.data.sources.task_schemas import ClassName
from vlm_tune.errors import DataError
from vlm_tune.paths import home
from vlm_tune.quoting import name_list, quoted, reason_of

if TYPE_CHECKING:
    import pyarrow

SAVED = ("state.json", "dataset_dict.json")
"""Files of a folder that the datasets library saved a data set to; one of them is there."""
READ_ROWS = 128
"""Rows turned into Python objects at a time: rows hold images."""


def _ranges(rows: int, size: int = CHUNK_ROWS) -> Iterator[tuple[int, int]]:
    """(start, count) of consecutive ranges of at most `size` rows."""
    for start in range(0, rows, size):
        yield start, min(size, rows - start)


def _damage() -> tuple[type[Exception], ...]:
    """Types of exceptions raised for a damaged file and for a hub that does not answer."""
    import pyarrow

    return pyarrow.ArrowException, OSError, ValueError, MemoryError


def _broken(error: Exception) -> str:
    return f"can't be read: {reason_of(error)}"


def _lost(first: int, end: int, error: Exception) -> Iterator[tuple[int, Any]]:
    """A `DataError` for each row number in `range(first, end)`, the damaged part of a file."""
    for number in range(first, end):
        yield number, DataError(_broken(error), kind="damaged")


def python_rows(batch: pyarrow.RecordBatch | pyarrow.Table) -> list[dict[str, Any]]:
    """The rows as Python objects, with a `DataError` for a cell that Python can't represent.

    Such cells are dates and times out of Python's range, and texts that are not UTF-8. A row is
    refused only by a form that reads such a cell.
    """
    try:
        return batch.to_pylist()
    except (ValueError, ArithmeticError):
        columns = {
            name: [_cell(value) for value in batch.column(place)]
            for place, name in enumerate(batch.schema.names)
        }
        return [
            dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)
        ]


def _cell(value: Any) -> Any:
    try:
        return value.as_py()
    except (ValueError, ArithmeticError) as error:
        return DataError(
            reason_of(error),
            kind="text" if isinstance(error, UnicodeDecodeError) else "field",
        )


class Parquet:
    """The Parquet format: stretches are row groups, divided where they are long."""

    def stretches(self, path: Path) -> Iterator[Stretch]:
        """Stretches with the payload (row group, first row in it, rows).

        Reading starts at the beginning of the group, so a group is divided into at most 16.
        """
        from pyarrow import parquet

        try:
            metadata = parquet.read_metadata(path)
        except _damage() as error:
            raise DataError(_broken(error), source=str(path)) from None
        first = 1
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            for start, count in _ranges(rows, max(CHUNK_ROWS, -(-rows // 16))):
                yield first, count, (group, start, count)
                first += count

    def rows(
        self, path: Path, first_row: int, payload: tuple[int, int, int]
    ) -> Iterator[tuple[int, Any]]:
        """The stretch's rows; where the file is damaged, `DataError`s replace the rest."""
        from pyarrow import parquet

        group, start, count = payload
        number = first_row
        try:
            with parquet.ParquetFile(path) as file:
                rows_read = 0
                for batch in file.iter_batches(batch_size=READ_ROWS, row_groups=[group]):
                    begin = max(start - rows_read, 0)
                    end = min(start + count - rows_read, batch.num_rows)
                    rows_read += batch.num_rows
                    for row in python_rows(batch.slice(begin, end - begin)) if begin < end else []:
                        yield number, row
                        number += 1
                    if rows_read >= start + count:
                        return
        except _damage() as error:
            yield from _lost(number, first_row + count, error)


class ArrowFile:
    """Arrow's IPC file format (Feather) and stream format (written by `datasets`)."""

    def stretches(self, path: Path) -> Iterator[Stretch]:
        """Stretches with the payload (batch, first row in it, rows)."""
        first = 1
        try:
            for place, rows in enumerate(_batch_sizes(path)):
                for start, count in _ranges(rows):
                    yield first, count, (place, start, count)
                    first += count
        except _damage() as error:
            raise DataError(_broken(error), source=str(path)) from None

    def rows(
        self, path: Path, first_row: int, payload: tuple[int, int, int]
    ) -> Iterator[tuple[int, Any]]:
        """The stretch's rows; where the file is damaged, `DataError`s replace the rest."""
        place, start, count = payload
        number = first_row
        try:
            batch = _batch(path, place)
            _check_offsets(batch)
            for begin, some in _ranges(count, READ_ROWS):
                for row in python_rows(batch.slice(start + begin, some)):
                    yield number, row
                    number += 1
        except _damage() as error:
            yield from _lost(number, first_row + count, error)


def _check_offsets(batch: pyarrow.RecordBatch) -> None:
    """Raises `pyarrow.ArrowInvalid` for a damaged batch, whose offsets would lead out of it.

    Texts are viewed as bytes, because they may be invalid UTF-8.
    """
    import pyarrow

    for column in batch.columns:
        if pyarrow.types.is_string(column.type):
            column = column.view(pyarrow.binary())
        elif pyarrow.types.is_large_string(column.type):
            column = column.view(pyarrow.large_binary())
        column.validate(full=True)


def _is_stream(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(6) != b"ARROW1"


def _batch_sizes(path: Path) -> Iterator[int]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as mapped:
        if _is_stream(path):
            yield from (batch.num_rows for batch in pyarrow.ipc.open_stream(mapped))
        else:
            reader = pyarrow.ipc.open_file(mapped)
            yield from (
                reader.get_batch(place).num_rows for place in range(reader.num_record_batches)
            )


def _batch(path: Path, place: int) -> pyarrow.RecordBatch:
    import pyarrow

    if _is_stream(path):
        return _stream(path, path.stat().st_mtime_ns)[place]
    return pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).get_batch(place)


@lru_cache(maxsize=1)
def _stream(path: Path, changed: int) -> list[pyarrow.RecordBatch]:
    """The stream's batches, cached because a stream has no index; rows stay in the mapped file.

    `changed`, the modification time, is part of the cache's key.
    """
    import pyarrow

    return list(pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))))


class DatasetRows:
    """A data set of the datasets library, read as Arrow: no image is decoded.

    With `streaming`, rows are fetched as they are read: a chunk is a shard, and rows are numbered
    by shard. A data set written by `save_to_disk` is local, and never streamed.
    """

    def __init__(self, config: DatasetSource, *, streaming: bool = False) -> None:
        self.name = config.name
        folder = Path(home(config.name))
        self._folder = folder if folder.is_dir() else None
        self._version = (config.name, config.config, config.split, config.revision)
        self._data = _open_dataset(config, streaming)
        self._streaming = not hasattr(self._data, "__len__")
        self._classes = _class_names(self._data.features)
        self._label = config.columns.get("label", "label")
        self._ignored = set(config.ignore)

    def fingerprint(self) -> str:
        """A hash of name, configuration, split, revision and the library's own fingerprint.

        The library's fingerprint follows the files; it is left out for a streamed data set.
        """
        return digest(*self._version, "" if self._streaming else dataset_fingerprint(self._data))

    def chunks(self) -> Iterator[Chunk]:
        """Ranges of rows, or the shards of a streamed data set."""
        if self._streaming:
            for shard in range(self._data.num_shards):
                yield Chunk(shard, 1, sys.maxsize, shard)
            return
        for number, (start, count) in enumerate(_ranges(len(self._data))):
            yield Chunk(number, start + 1, count, (start, count))

    def rows(self, chunk: Chunk) -> Iterator[StoredRow]:
        """The chunk's rows; a class's number is replaced by its name."""
        source = f"{self.name}, shard {chunk.payload}" if self._streaming else self.name
        label = f"{Path(self.name).name}/{self._version[2]}" + (
            f"/{chunk.payload}" if self._streaming else ""
        )
        number = chunk.first_row
        try:
            for table in self._tables(chunk):
                for row in python_rows(table):
                    yield StoredRow(source, label, number, self._named(row), self._images())
                    number += 1
        except _damage() as error:
            if self._streaming:
                # The shard's number of remaining rows is unknown: they can't be counted as bad.
                raise DataError(_broken(error), source=source, row=number, kind="damaged") from None
            for lost, fault in _lost(number, chunk.first_row + chunk.rows, error):
                yield StoredRow(source, label, lost, fault)

    def _tables(self, chunk: Chunk) -> Iterator[pyarrow.Table]:
        data = self._data.with_format("arrow")
        if self._streaming:
            yield from data.shard(num_shards=data.num_shards, index=chunk.payload).iter(READ_ROWS)
            return
        start, count = chunk.payload
        for begin, some in _ranges(count, READ_ROWS):
            yield data[start + begin : start + begin + some]

    def _named(self, row: dict[str, Any]) -> dict[str, Any]:
        for column, names in self._classes.items():
            place = row.get(column)
            row[column] = (
                ClassName(names[place])
                if isinstance(place, int) and 0 <= place < len(names)
                else None
            )
        if self._label in self._classes and self._label not in self._ignored:
            row.setdefault("choices", [ClassName(name) for name in self._classes[self._label]])
        return row

    def _images(self) -> Path:
        """Root of image paths: the data set's folder, or the library's cache of downloads."""
        if self._folder is not None:
            return self._folder
        from datasets.config import HF_CACHE_HOME

        return Path(HF_CACHE_HOME)


def _open_dataset(config: DatasetSource, streaming: bool) -> Any:
    """The data set's split. Raises `DataError` with the library's message."""
    import datasets

    try:
        name = home(config.name)
        if any((Path(name) / file).is_file() for file in SAVED):
            data: Any = datasets.load_from_disk(name)
            if isinstance(data, datasets.DatasetDict):
                if config.split not in data:
                    raise DataError(
                        f"no split {quoted(config.split)}; expected one of {name_list(data)}"
                    )
                data = data[config.split]
            return data
        return datasets.load_dataset(
            name, config.config, split=config.split, revision=config.revision, streaming=streaming
        )
    except DataError as error:
        raise DataError(error.message, source=config.name) from None
    except Exception as error:
        # The library's loaders raise many types of errors; all mean an unusable data set.
        raise DataError(
            f"can't be loaded: {type(error).__name__}: {reason_of(error)}", source=config.name
        ) from None


def _class_names(features: Any) -> dict[str, list[str]]:
    """Class names by column, for the columns that hold class numbers."""
    return {
        column: feature.names
        for column, feature in (features or {}).items()
        if type(feature).__name__ == "ClassLabel"
    }
