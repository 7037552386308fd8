"""The reader of each kind of source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm_tune.config.data import DatasetSource, FileSource, Source, WebDatasetSource
from vlm_tune.data.sources.base import SourceReader
from vlm_tune.data.sources.class_folders import ClassFolders
from vlm_tune.data.sources.columnar import ArrowFile, DatasetRows, Parquet
from vlm_tune.data.sources.easy_vqa import EasyVqa
from vlm_tune.data.sources.file_rows import FileRows, find_files
from vlm_tune.data.sources.json_csv import FileFormat, csv_format, json_format
from vlm_tune.data.sources.records import RowsReader
from vlm_tune.data.sources.stored_files import unpacked_name
from vlm_tune.data.sources.unanswered import QuestionRows
from vlm_tune.data.sources.webdataset import TarShard
from vlm_tune.data.types import Conversation
from vlm_tune.errors import DataError
from vlm_tune.quoting import quoted

FORMATS: dict[str, Callable[[Path], FileFormat]] = {
    ".json": json_format,
    ".jsonl": json_format,
    ".ndjson": json_format,
    ".csv": lambda path: csv_format(path, ","),
    ".tsv": lambda path: csv_format(path, "\t"),
    ".parquet": lambda path: Parquet(),
    ".arrow": lambda path: ArrowFile(),
    ".feather": lambda path: ArrowFile(),
}
"""The format of a file by its suffix; files of text may be gzip (.jsonl.gz)."""
TEXTS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
SHARDS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def file_rows(config: FileSource) -> FileRows:
    """The container of a file's rows, or of the rows of all files that match a pattern."""
    files = find_files(config.path)
    formats = tuple(_file_format(path) for path in files)
    return FileRows(config.path, tuple(files), formats)


def _file_format(path: Path) -> FileFormat:
    """The format of a file.

    Raises `DataError` for an unknown suffix, and for a file whose content is something else.
    """
    ending = unpacked_name(path).suffix.lower()
    if ending not in FORMATS or (ending != path.suffix.lower() and ending not in TEXTS):
        hint = " (a tar shard is of `kind: webdataset`)" if path.name.endswith(SHARDS) else ""
        message = (
            f"the ending {quoted(path.suffix)} is not one of {', '.join(FORMATS)} (and .gz "
            f"behind those of text){hint}"
        )
        raise DataError(message, source=str(path))
    try:
        return FORMATS[ending](path)
    except OSError as error:
        raise DataError(f"can't be read: {error.strerror or error}", source=str(path)) from None


def shard_rows(config: WebDatasetSource) -> FileRows:
    """The container of the samples of tar shards."""
    files = find_files(config.path)
    for path in files:
        if not path.name.endswith(SHARDS):
            raise DataError(f"a shard ends in {', '.join(SHARDS)}", source=str(path))
    return FileRows(config.path, tuple(files), (TarShard(),) * len(files))


def open_file(config: FileSource, seed: int, streaming: bool) -> SourceReader:
    """A reader of a file's rows, or of the rows of all files that match a pattern."""
    return RowsReader(file_rows(config), config, seed=seed)


def open_webdataset(config: WebDatasetSource, seed: int, streaming: bool) -> SourceReader:
    """A reader of the samples of tar shards."""
    return RowsReader(shard_rows(config), config, seed=seed)


def open_dataset(config: DatasetSource, seed: int, streaming: bool) -> SourceReader:
    """A reader of a data set of the datasets library."""
    return RowsReader(DatasetRows(config, streaming=streaming), config, seed=seed)


SOURCES: dict[str, Callable[[Any, int, bool], SourceReader]] = {
    "file": open_file,
    "webdataset": open_webdataset,
    "dataset": open_dataset,
    "folder": lambda config, seed, streaming: ClassFolders(config, seed=seed),
    "easy_vqa": lambda config, seed, streaming: EasyVqa(config, seed=seed),
}


def open_source(config: Source, *, seed: int, streaming: bool = False) -> SourceReader:
    """The reader of a source.

    Args:
        config: the source as configured.
        seed: seed of the draws of prompts, few-shot examples and the order of choices.
        streaming: fetch a Hub data set while it is read rather than first.

    Raises:
        DataError: the source does not exist, or the form of its rows can't be detected.
    """
    return SOURCES[getattr(config, "kind")](config, seed, streaming)  # noqa: B009


def read_path(
    path: str, *, seed: int, unanswered: bool = False
) -> tuple[list[Conversation], set[tuple[str, int]]]:
    """Reads all rows of a file, a pattern of files, or tar shards, with their detected form.

    Args:
        path: the file or pattern.
        seed: as for `open_source`.
        unanswered: accept rows without their last answer, which get a placeholder.

    Returns:
        The rows, and the (source, row) of those with a placeholder.

    Raises:
        DataError: the first row that can't be used.
    """
    tarred = path.endswith(SHARDS)
    config = (
        WebDatasetSource(kind="webdataset", path=path)
        if tarred
        else FileSource(kind="file", path=path)
    )
    container = shard_rows(config) if isinstance(config, WebDatasetSource) else file_rows(config)
    questions = QuestionRows(container)
    reader = RowsReader(questions if unanswered else container, config, seed=seed)
    rows = []
    for row in read_all([reader]):
        if isinstance(row, DataError):
            raise row
        rows.append(replace(row, source_name=Path(path).stem))
    return rows, questions.unanswered


def read_all(readers: Iterable[SourceReader]) -> Iterator[Conversation | DataError]:
    """Yields all rows of the sources in order, read lazily."""
    for reader in readers:
        for chunk in reader.chunks():
            yield from reader.conversations(chunk)
