"""Rows in files: one file or all files of a pattern, divided into stretches that workers read."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlm_tune.data.sources.base import Chunk, StoredRow, files_digest
from vlm_tune.data.sources.json_csv import Csv, FileFormat
from vlm_tune.data.sources.stored_files import unpacked_name
from vlm_tune.errors import DataError
from vlm_tune.paths import home, is_file, is_folder
from vlm_tune.quoting import escaped, reason_of


@dataclass(frozen=True)
class FileRows:
    """The rows of files, each in its own format.

    Rows are numbered, and named in messages, by file.
    """

    name: str
    files: tuple[Path, ...]
    formats: tuple[FileFormat, ...]

    def fingerprint(self) -> str:
        """A hash of the files' paths, sizes and modification times."""
        return files_digest(self.files)

    def chunks(self) -> Iterator[Chunk]:
        """The files' stretches in order."""
        number = 0
        for place, (path, form) in enumerate(zip(self.files, self.formats, strict=True)):
            try:
                for first_row, rows, payload in form.stretches(path):
                    yield Chunk(number, first_row, rows, (place, payload))
                    number += 1
            except OSError as error:
                raise DataError(f"can't be read: {reason_of(error)}", source=str(path)) from None

    def rows(self, chunk: Chunk) -> Iterator[StoredRow]:
        """The chunk's rows in order."""
        place, payload = chunk.payload
        path = self.files[place]
        label = unpacked_name(path).stem
        if len(self.files) > 1:
            shared = os.path.commonpath([file.parent for file in self.files])
            label = unpacked_name(path.relative_to(shared)).with_suffix("").as_posix()
        # A file's name may hold bytes that are no valid text: only its name in messages is escaped.
        source = escaped(str(path))
        label = escaped(label)
        untyped = isinstance(self.formats[place], Csv)
        for number, value in self.formats[place].rows(path, chunk.first_row, payload):
            yield StoredRow(source, label, number, value, path.parent, untyped)


def find_files(pattern: str) -> list[Path]:
    """The file, or the sorted files that match a pattern such as `~/data/**/*.jsonl`.

    Raises `DataError` for a folder, and where there is no file.
    """
    pattern = home(pattern)
    path = Path(pattern)
    if is_file(path):
        return [path]
    if is_folder(path):
        raise DataError(
            "is a folder; name a file, or a pattern such as folder/*.jsonl", source=pattern
        )
    # Not Path.glob: a pattern may be absolute.
    paths = sorted(Path(name) for name in glob.glob(pattern, recursive=True))  # noqa: PTH207
    files = [path for path in paths if is_file(path)]
    if not files:
        where = "" if path.is_absolute() else f" (from {Path.cwd()})"
        raise DataError(
            ("no file fits this pattern" if glob.has_magic(pattern) else "no such file") + where,
            source=pattern,
        )
    return files
