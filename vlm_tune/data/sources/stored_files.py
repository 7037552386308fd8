"""Access to stored files: plain or gzip by their first bytes, and lists inside a JSON object."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from vlm_tune.errors import DataError
from vlm_tune.quoting import reason_of

BLOCK = 1 << 20
MAX_ROW_BYTES = 1 << 28
GZIP = b"\x1f\x8b"
OTHERS = {
    b"PK\x03\x04": "a zip archive: unpack it",
    b"BZh": "bzip2: unpack it",
    b"\xfd7zXZ": "xz: unpack it",
    b"\x28\xb5\x2f\xfd": "zstd: unpack it",
    b"PAR1": "a Parquet file: name it .parquet",
    b"ARROW1": "an Arrow file: name it .feather",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
}
"""Other kinds of files by their first bytes, and what the user should do with them."""

_idle: dict[tuple[int, Path, int], gzip.GzipFile] = {}
"""The gzip file that this process read last, at its last position.

The next stretch continues there, so that nothing is unpacked twice.
"""


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """The open file, decompressed if it is gzip.

    Raises `DataError` for gzip that is truncated or damaged.
    """
    with path.open("rb") as plain:
        packed = plain.read(len(GZIP)) == GZIP
        if not packed:
            plain.seek(0)
            yield plain
            return
    key = (os.getpid(), path, path.stat().st_mtime_ns)
    file = _idle.pop(key, None) or gzip.GzipFile(path)
    try:
        file.seek(0)
        yield file  # type: ignore[misc]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        file.close()
        raise DataError(
            f"the gzip file is cut or damaged: {reason_of(error)}", source=str(path), kind="damaged"
        ) from None
    else:
        _idle.clear()
        _idle[key] = file


def check_text(path: Path) -> None:
    """Raises `DataError` for a file that is not text by its first bytes."""
    with path.open("rb") as file:
        start = file.read(8)
    for begin, what in OTHERS.items():
        if start.startswith(begin):
            raise DataError(f"is {what}", source=str(path))


def unpacked_name(path: Path) -> Path:
    """The path without the ending `.gz`."""
    return path.with_suffix("") if path.suffix.lower() == ".gz" else path


# --- a list inside a JSON object ------------------------------------------------------------------

_SPACE = re.compile(r"[ \t\r\n]*")


class JsonScan:
    """Reads JSON values at byte offsets of a file in bounded memory.

    Text is decoded as Latin-1, one character per byte.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self._decode = json.JSONDecoder(strict=False).raw_decode

    def character(self, offset: int) -> tuple[str, int]:
        """The first character from `offset` on that is not white space, and its offset.

        The character is "" at the end of the file.
        """
        while True:
            self.file.seek(offset)
            text = self.file.read(4096).decode("latin-1")
            start = _SPACE.match(text).end()  # type: ignore[union-attr]
            if start < len(text) or not text:
                return text[start : start + 1], offset + start
            offset += len(text)

    def value(self, offset: int) -> tuple[Any, int]:
        """The value at `offset` and its end offset. Raises `DataError` for malformed JSON."""
        size = 1 << 16
        while True:
            self.file.seek(offset)
            text = self.file.read(size).decode("latin-1")
            whole = len(text) < size
            try:
                value, end = self._decode(text)
                if whole or end < len(text):  # a number may continue after the text read
                    return value, offset + end
            except RecursionError:
                raise DataError("nested too deeply") from None
            except ValueError as error:
                if whole or size > MAX_ROW_BYTES:
                    place = offset + getattr(error, "pos", 0)
                    raise DataError(
                        f"{str(error.args[0]).split(':')[0]} at byte {place:,}"
                    ) from None
            size *= 4

    def expect(self, offset: int, wanted: str) -> tuple[str, int]:
        """The next character, which must be one of `wanted`, and the offset after it.

        Raises `DataError` for another character.
        """
        character, place = self.character(offset)
        if not character or character not in wanted:
            actual = repr(character) if character else "the file's end"
            raise DataError(f"expected {' or '.join(wanted)} at byte {place:,}, got {actual}")
        return character, place + 1


def scan_object(path: Path) -> tuple[dict[str, int], int]:
    """The fields of the JSON object at the beginning of a file, and the object's end offset.

    The value of a field that is a list of objects is the offset after its `[`; of other fields it
    is -1. Raises `DataError` for a file that does not begin with an object.
    """
    return _scanned(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _scanned(path: Path, changed: int) -> tuple[dict[str, int], int]:
    fields: dict[str, int] = {}
    with reading(path) as file:
        scan = JsonScan(file)
        file.seek(0)
        start = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
        _, place = scan.expect(start, "{")
        if scan.character(place)[0] == "}":
            return fields, scan.expect(place, "}")[1]
        while True:
            _, name_place = scan.character(place)
            name, place = scan.value(name_place)
            _, place = scan.expect(place, ":")
            first, value_place = scan.character(place)
            inner = scan.character(value_place + 1)[0] if first == "[" else ""
            if first == "[":
                place = _list_end(scan, value_place + 1)
            else:
                _, place = scan.value(value_place)
            fields[str(name).encode("latin-1", "replace").decode("utf-8", "replace")] = (
                value_place + 1 if inner == "{" else -1
            )
            separator, place = scan.expect(place, ",}")
            if separator == "}":
                return fields, place


def _list_end(scan: JsonScan, place: int) -> int:
    """The end offset of the list whose elements begin at `place`."""
    if scan.character(place)[0] == "]":
        return scan.expect(place, "]")[1]
    while True:
        _, start = scan.character(place)
        _, place = scan.value(start)
        separator, place = scan.expect(place, ",]")
        if separator == "]":
            return place
