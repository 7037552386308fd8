"""Rows written to files in every container, and read back, for the tests of sources."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_tune.config.data import FileSource
from vlm_tune.data.sources.registry import open_source, read_all
from vlm_tune.data.types import Conversation
from vlm_tune.errors import DataError

FILES = ("json", "jsonl", "csv", "tsv", "parquet", "arrow", "feather")


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """The rows in the format of the path's ending; `.arrow` is a stream, `.feather` a file."""
    kind = path.suffix[1:]
    if kind == "json":
        path.write_text(json.dumps(list(rows), indent=1, ensure_ascii=False), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(
                {key: json.dumps(v) if isinstance(v, list) else v for key, v in row.items()}
                for row in rows
            )
    else:
        import pyarrow
        from pyarrow import feather, parquet

        table = pyarrow.Table.from_pylist(list(rows))
        if kind == "parquet":
            parquet.write_table(table, path, row_group_size=5)
        elif kind == "feather":
            feather.write_feather(table, str(path), chunksize=3)
        else:
            with (
                pyarrow.OSFile(str(path), "wb") as sink,
                pyarrow.ipc.new_stream(sink, table.schema) as writer,
            ):
                writer.write_table(table, max_chunksize=3)
    return path


def write_shard(path: Path, samples: Sequence[dict[str, bytes]], mode: str = "w") -> Path:
    """A tar of samples, each {ending: content}, named 0000, 0001, ..."""
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for number, sample in enumerate(samples):
            for ending, content in sample.items():
                member = tarfile.TarInfo(f"{number:04d}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def file_source(path: Path | str, **options: Any) -> FileSource:
    """A file source of the recipe."""
    return FileSource(kind="file", path=str(path), **options)


def read(source: Any, *, seed: int = 0, streaming: bool = False) -> list[Conversation | DataError]:
    """All rows of a source."""
    return list(read_all([open_source(source, seed=seed, streaming=streaming)]))


def good(rows: Sequence[Conversation | DataError]) -> list[Conversation]:
    """The rows, none of which is bad."""
    assert all(isinstance(row, Conversation) for row in rows), [
        row for row in rows if isinstance(row, DataError)
    ][:3]
    return [row for row in rows if isinstance(row, Conversation)]
