"""Rows in JSON and CSV files, divided into stretches that workers read."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vlm_tune.data.sources.base import CHUNK_ROWS
from vlm_tune.data.sources.fields import FIELDS
from vlm_tune.data.sources.legible import SURROGATE
from vlm_tune.data.sources.stored_files import (
    BLOCK,
    MAX_ROW_BYTES,
    check_text,
    reading,
    scan_object,
    unpacked_name,
)
from vlm_tune.errors import DataError
from vlm_tune.quoting import name_list, reason_of

CHUNK_BYTES = 1 << 25
"""Size at which a chunk ends early: rows that embed images are large."""
BOM = b"\xef\xbb\xbf"

Stretch = tuple[int, int, Any]
"""(number of the first row (from 1), maximum number of rows, the format's payload to read them)."""


class FileFormat(Protocol):
    """How rows are stored in one file."""

    def stretches(self, path: Path) -> Iterator[Stretch]:
        """The file's stretches in order, in bounded memory.

        Raises `DataError` for a file that can't be read at all.
        """
        ...

    def rows(self, path: Path, first_row: int, payload: Any) -> Iterator[tuple[int, Any]]:
        """(number, fields or `DataError`) of each row of a stretch."""
        ...


def _stretches(start: int, ends: Iterable[int]) -> Iterator[Stretch]:
    """Stretches of about CHUNK_ROWS rows, with the payload (first byte, byte after the last).

    The rows begin at byte `start` and end at `ends`.
    """
    first = 1
    count = 0
    stop = start
    for stop in ends:
        count += 1
        if count == CHUNK_ROWS or stop - start > CHUNK_BYTES:
            yield first, count, (start, stop)
            first = first + count
            start = stop
            count = 0
    if count:
        yield first, count, (start, stop)


# --- JSON -----------------------------------------------------------------------------------------


class JsonLines:
    """One JSON object per line; rows are numbered by line, empty lines are skipped."""

    def stretches(self, path: Path) -> Iterator[Stretch]:
        """Stretches of about CHUNK_ROWS lines; lines are counted, not parsed."""
        first = 1
        start = 0
        lines = 0
        offset = 0
        last = b"\n"
        with reading(path) as file:
            while block := file.read(BLOCK):
                place = 0
                while lines + block.count(b"\n", place) >= CHUNK_ROWS:
                    for _ in range(CHUNK_ROWS - lines):
                        place = block.find(b"\n", place) + 1
                    yield first, CHUNK_ROWS, (start, offset + place)
                    first = first + CHUNK_ROWS
                    start = offset + place
                    lines = 0
                lines += block.count(b"\n", place)
                end = block.rfind(b"\n") + 1
                if end > place and offset + end - start > CHUNK_BYTES:
                    yield first, lines, (start, offset + end)
                    first = first + lines
                    start = offset + end
                    lines = 0
                offset += len(block)
                last = block[-1:]
        if offset > start:
            yield first, lines + (last != b"\n"), (start, offset)

    def rows(
        self, path: Path, first_row: int, payload: tuple[int, int]
    ) -> Iterator[tuple[int, Any]]:
        """Each line's object, or a `DataError` for an unreadable line; later lines are read."""
        start, stop = payload
        with reading(path) as file:
            file.seek(start)
            number = first_row
            while file.tell() < stop:
                line = file.readline(MAX_ROW_BYTES)
                too_long = len(line) == MAX_ROW_BYTES and not line.endswith(b"\n")
                while too_long and (rest := file.readline(BLOCK)) and not rest.endswith(b"\n"):
                    pass
                if number == 1:
                    line = line.removeprefix(BOM)
                if too_long:
                    yield (
                        number,
                        DataError(f"a line of more than {MAX_ROW_BYTES:,} bytes", kind="not_json"),
                    )
                elif line.strip():
                    yield (
                        number,
                        json_value(
                            line,
                            cut=""
                            if line.endswith(b"\n")
                            else " (the file's last line, perhaps cut)",
                        ),
                    )
                number += 1


@dataclass(frozen=True)
class JsonList:
    """One JSON list of objects; the file is scanned by element, never held in memory as a whole.

    `start` is the byte where its elements begin if the list is a field of an object, as in
    {"version": 1, "data": [...]}.
    """

    start: int | None = None

    def stretches(self, path: Path) -> Iterator[Stretch]:
        """Stretches of about CHUNK_ROWS elements.

        Raises `DataError` where the list is truncated or malformed.
        """
        start = self.start
        if start is None:
            with reading(path) as file:
                start = file.read(BLOCK).find(b"[") + 1
        elements = 0

        def ends() -> Iterator[int]:
            nonlocal elements
            for end, _ in list_elements(path, start, inside=self.start is not None):
                elements += 1
                yield end

        try:
            yield from _stretches(start, ends())
        except DataError as error:
            raise DataError(
                f"not a JSON list: {error.message} (after element {elements})", source=str(path)
            ) from None

    def rows(
        self, path: Path, first_row: int, payload: tuple[int, int]
    ) -> Iterator[tuple[int, Any]]:
        """The stretch's elements."""
        elements = list_elements(path, *payload, inside=self.start is not None)
        for number, (_, element) in enumerate(elements, first_row):
            yield number, json_value(element.encode("latin-1"))


_SPACE = re.compile(r"[ \t\r\n]*")
_AFTER = re.compile(r"[ \t\r\n]*([,\]])")


def list_elements(
    path: Path, start: int, stop: int | None = None, *, inside: bool = False
) -> Iterator[tuple[int, str]]:
    """Yields (end offset, text) of each element of a JSON list with elements from byte `start` on.

    It ends at byte `stop` or at the list's end. `inside` an object, more text may follow the list.

    Text is decoded as Latin-1, one character per byte, so that offsets are bytes. JSON's own
    characters are the same in UTF-8, whose other bytes occur only in strings. Raises `DataError`
    for text that is not a list.
    """
    decode = json.JSONDecoder(strict=False).raw_decode
    with reading(path) as file:
        file.seek(start)
        text = ""
        offset = start
        place = 0
        first = True
        while stop is None or offset + place < stop:
            begin = _SPACE.match(text, place).end()  # type: ignore[union-attr]
            closing = None
            fault = "it ends early"
            if first and text[begin : begin + 1] == "]":
                end = begin
                closing = _AFTER.match(text, begin)
            else:
                try:
                    _, end = decode(text, begin)
                    closing = _AFTER.match(text, end)
                except ValueError as error:
                    fault = (
                        f"{error.args[0].split(':')[0]} at byte {offset + getattr(error, 'pos', 0)}"
                    )
                    end = begin
                except RecursionError:
                    raise DataError("nested too deeply") from None
            if closing is None:
                # The element may continue after the text read so far; doubling keeps retries cheap.
                more = (
                    file.read(max(BLOCK, len(text) - place))
                    if len(text) - place <= MAX_ROW_BYTES
                    else b""
                )
                if not more:
                    raise DataError(fault)
                text = text[place:] + more.decode("latin-1")
                offset = offset + place
                place = 0
                continue
            first = False
            place = closing.end()
            if end > begin:
                yield offset + place, text[begin:end]
            if closing[1] == "]":
                if not inside and (text[place:] + file.read(BLOCK).decode("latin-1")).strip():
                    raise DataError(f"more text after the list, at byte {offset + place}")
                return


def json_value(data: bytes, cut: str = "") -> Any:
    """The decoded value, or a `DataError` that describes its fault and ends in `cut`."""
    try:
        text = data.decode("utf-8")
        if "\0" in text:
            raise ValueError("a NUL byte")
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return DataError(f"not JSON: {reason_of(error)}{cut}", kind="not_json")


# --- CSV ------------------------------------------------------------------------------------------


class _Lines:
    """Iterator over a file's lines as text; `offset` is the byte where the next line begins."""

    def __init__(self, file: Any, offset: int) -> None:
        self.file = file
        self.offset = offset

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.file.readline(MAX_ROW_BYTES)
        if not line:
            raise StopIteration
        self.offset += len(line)
        return line.decode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class Csv:
    """A table as text with a header, which has no row number; an empty cell is a missing value."""

    delimiter: str = ","

    def stretches(self, path: Path) -> Iterator[Stretch]:
        """Stretches of about CHUNK_ROWS records; a record may span lines."""
        with reading(path) as file:
            header, start = self._header(path, file)
            if len(set(header)) < len(header):
                raise DataError(f"a column comes twice in the header {header}", source=str(path))
            yield from _stretches(start, (end for end, _ in self._records(file, start)))

    def rows(
        self, path: Path, first_row: int, payload: tuple[int, int]
    ) -> Iterator[tuple[int, Any]]:
        """Each record's cells by column, or a `DataError` for a record that can't be read."""
        start, stop = payload
        with reading(path) as file:
            header, _ = self._header(path, file)
            for number, (end, record) in enumerate(self._records(file, start), first_row):
                yield number, self._row(header, record)
                if end >= stop:
                    return

    def _row(self, header: list[str], record: list[str] | csv.Error) -> Any:
        if isinstance(record, csv.Error):
            return DataError(f"not CSV: {record}", kind="not_csv")
        if len(record) != len(header):
            return DataError(
                f"{len(record)} cells, the header has {len(header)}: {name_list(header)}",
                kind="not_csv",
            )
        if any("\0" in cell for cell in record):
            return DataError("a NUL byte", kind="not_csv")
        if any(map(SURROGATE.search, record)):
            columns = [
                name for name, cell in zip(header, record, strict=True) if SURROGATE.search(cell)
            ]
            return DataError(f"not UTF-8: {name_list(columns)}", kind="not_csv")
        return {name: cell or None for name, cell in zip(header, record, strict=True)}

    def _header(self, path: Path, file: Any) -> tuple[list[str], int]:
        """The column names and where the first record begins."""
        for end, record in self._records(file, 0):
            if isinstance(record, csv.Error):
                raise DataError(f"the header is not CSV: {record}", source=str(path))
            return [name.removeprefix("\ufeff").strip() for name in record], end
        raise DataError("no header", source=str(path))

    def _records(self, file: Any, start: int) -> Iterator[tuple[int, list[str] | csv.Error]]:
        """Yields (end offset, cells or error) of each record from byte `start`.

        Empty lines are skipped.
        """
        # The module's default limit is 128 KB per cell, too little for an image as a data URL.
        csv.field_size_limit(1 << 26)
        file.seek(start)
        lines = _Lines(file, start)
        reader = csv.reader(lines, delimiter=self.delimiter, strict=True)
        while True:
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                record = error
            if record:
                yield lines.offset, record


# --- which format a file has ----------------------------------------------------------------------


def json_format(path: Path) -> FileFormat:
    """The format of a JSON file, by its first characters: a list, lines, or an object with a list.

    Raises `DataError` for a file that is not text, and for one object without a list of rows.
    """
    check_text(path)
    with reading(path) as file:
        start = file.read(BLOCK).removeprefix(BOM).lstrip()
    if start.startswith(b"["):
        return JsonList()
    if not start.startswith(b"{"):
        return JsonLines()
    first, newline, _ = start.partition(b"\n")
    try:
        lists, end = scan_object(path)
    except DataError as error:
        # An object over several lines is not JSON Lines: each line would be reported as a fault.
        if newline and first.strip() == b"{" and start[len(first) :].lstrip().startswith(b'"'):
            raise DataError(f"not JSON: {error.message}", source=str(path)) from None
        return JsonLines()
    with reading(path) as file:
        file.seek(end)
        if file.read(BLOCK).strip():
            return JsonLines()
    rows = {name: place for name, place in lists.items() if place >= 0}
    one_line = b"\n" not in start.rstrip()
    if one_line and (not rows or unpacked_name(path).suffix.lower() != ".json"):
        return JsonLines()
    if "data" not in rows and FIELDS & (rows or lists).keys():
        if not one_line:
            raise DataError(
                "is one row over several lines, neither JSONL nor a list: put it in [ ]",
                source=str(path),
            )
        return JsonLines()
    if len(rows) > 1 and "data" not in rows:
        raise DataError(
            f"contains several lists of objects: {name_list(rows)}; put the intended one into a "
            "file of its own",
            source=str(path),
        )
    if not rows:
        raise DataError(
            f"holds one JSON object ({name_list(lists) or 'empty'}) but no list of rows",
            source=str(path),
        )
    return JsonList(rows.get("data", next(iter(rows.values()))))


def csv_format(path: Path, delimiter: str) -> FileFormat:
    """The format of a table as text. Raises `DataError` for a file that is not text."""
    check_text(path)
    return Csv(delimiter)
