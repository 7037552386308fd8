"""WebDataset tar shards: members of one stem form a row; images are read in place."""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_tune.compat import forget_members
from vlm_tune.data.audio.decode import AUDIO_SUFFIXES
from vlm_tune.data.sources.base import CHUNK_ROWS
from vlm_tune.data.sources.json_csv import MAX_ROW_BYTES, Stretch, json_value
from vlm_tune.data.sources.video import DEMUXERS, IMAGE_SUFFIXES
from vlm_tune.data.types import Slice
from vlm_tune.errors import DataError
from vlm_tune.quoting import escaped, quoted, reason_of

PICKLES = {"pkl", "pickle", "pyd", "pt", "pth", "dill", "joblib"}
TEXTS = {
    "txt": "caption",
    "caption": "caption",
    "cls": "label",
    "question": "question",
    "answer": "answer",
    "ocr": "text",
}
"""Fields of text members by their ending; `json` members have their own fields."""


@dataclass
class _Sample:
    """The members of one stem by ending, or the `fault` that makes them unusable."""

    key: str
    start: int
    members: dict[str, Slice | bytes] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    fault: DataError | None = None


class TarShard:
    """The samples of a shard, read in place; a compressed shard is read as a whole."""

    def stretches(self, path: Path) -> Iterator[Stretch]:
        """Byte ranges of about CHUNK_ROWS samples; one range for a compressed shard.

        A compressed shard can't be read from a later byte.
        """
        first = 1
        count = 0
        start = 0
        for sample in _samples(path, 0, contents=False):
            if count == CHUNK_ROWS and not _is_compressed(path):
                yield first, count, (start, sample.start)
                first = first + count
                start = sample.start
                count = 0
            count += 1
        if count:
            yield first, count, (start, None)

    def rows(
        self, path: Path, first_row: int, payload: tuple[int, int | None]
    ) -> Iterator[tuple[int, Any]]:
        """Each sample's fields.

        A sample with a link, a pickle or a path out of the archive is a `DataError`.
        """
        start, stop = payload
        for number, sample in enumerate(_samples(path, start), first_row):
            if stop is not None and sample.start >= stop:
                return
            yield number, sample.fault or _fields(sample)


def _is_compressed(path: Path) -> bool:
    return path.suffix != ".tar"


def _samples(path: Path, start: int, *, contents: bool = True) -> Iterator[_Sample]:
    """The samples from byte `start` on; a damaged archive ends in a sample with the fault."""
    sample = None
    reached = start
    try:
        with path.open("rb") as file:
            file.seek(start)
            with tarfile.open(
                fileobj=file, mode="r:*" if _is_compressed(path) else "r:"
            ) as archive:
                while (member := archive.next()) is not None:
                    forget_members(archive)  # a shard may have millions
                    reached = member.offset
                    fault = _refused(member)
                    folder, _, base = member.name.rpartition("/")
                    stem, _, ending = base.partition(".")
                    if fault is None and (not member.isreg() or not stem):
                        continue  # folders, and hidden files such as ._0001.jpg
                    key = f"{folder}/{stem}"
                    if sample is None or sample.key != key:
                        if sample is not None:
                            yield sample
                        sample = _Sample(key, member.offset)
                    sample.fault = sample.fault or fault
                    ending = ending.lower()
                    if contents and sample.fault is None:
                        sample.members[ending] = _content(path, archive, member)
                        sample.names[ending] = member.name
                _check_end(path, archive)
        if sample is not None:
            yield sample
    except (tarfile.TarError, EOFError, OSError, zlib.error, DataError) as error:
        if sample is not None:
            yield sample
        yield _Sample(
            "",
            reached,
            fault=DataError(
                f"the shard is damaged near byte {reached}: {reason_of(error)}", kind="damaged"
            ),
        )


def _refused(member: tarfile.TarInfo) -> DataError | None:
    """The reason why a member is refused, or None.

    Nothing is ever unpacked to disk, but a shard with unsafe members is not to be trusted.
    """
    if (
        member.name.startswith(("/", "\\"))
        or re.match(r"[A-Za-z]:", member.name)
        or ".." in re.split(r"[/\\]", member.name)
    ):
        return DataError(
            f"the member {quoted(member.name)} points outside the archive", kind="unsafe"
        )
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        return DataError(
            f"the member {quoted(member.name)} is a link or not a regular file", kind="unsafe"
        )
    if PICKLES.intersection(member.name.lower().rpartition("/")[2].split(".")[1:]):
        return DataError(
            f"the member {quoted(member.name)} is a pickle, which could run code when read",
            kind="unsafe",
        )
    return None


def _content(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> Slice | bytes:
    if not _is_compressed(path):
        return Slice(path, member.offset_data, member.size)
    if member.size > MAX_ROW_BYTES:
        raise DataError(
            f"the member {quoted(member.name)} has {member.size:,} bytes", kind="damaged"
        )
    stream = archive.extractfile(member)
    assert stream is not None  # a plain file
    return stream.read()


def _check_end(path: Path, archive: tarfile.TarFile) -> None:
    """Raises `DataError` if reading ended at a damaged header, which tarfile takes for the end."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    block = archive.fileobj.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        raise DataError("a header is damaged", kind="damaged")


def _fields(sample: _Sample) -> dict[str, Any] | DataError:
    """A row: the JSON member's fields, texts by their ending, images, videos and audio."""
    # A member's name may hold bytes that are no valid text.
    row: dict[str, Any] = {"id": escaped(sample.key.strip("/."))}
    images = {}
    videos = {}
    clips = {}
    for ending, content in sample.members.items():
        kind = ending.rpartition(".")[2]
        if f".{kind}" in IMAGE_SUFFIXES:
            images[sample.names[ending]] = content
        elif f".{kind}" in DEMUXERS:
            videos[sample.names[ending]] = (
                content
                if isinstance(content, Slice)
                else {"bytes": content, "path": sample.names[ending]}
            )
        elif f".{kind}" in AUDIO_SUFFIXES:
            clips[sample.names[ending]] = content
        elif kind == "json":
            value = json_value(_read(content))
            if isinstance(value, DataError):
                return DataError(f"{sample.names[ending]}: {value.message}", kind="not_json")
            if not isinstance(value, dict):
                return DataError(
                    f"{sample.names[ending]} holds a {type(value).__name__}, not an object",
                    kind="not_json",
                )
            row |= value
        elif kind in TEXTS:
            try:
                row[TEXTS[kind]] = _read(content).decode("utf-8").strip()
            except UnicodeDecodeError as error:
                return DataError(f"{sample.names[ending]}: {reason_of(error)}", kind="not_json")
    _place(row, "image", images)
    _place(row, "video", videos)
    _place(row, "audio", clips)
    return row


def _place(row: dict[str, Any], kind: str, members: dict[str, Any]) -> None:
    """Puts the sample's media of a kind into its row.

    Their order is that of the JSON member if it names them, else that of the archive.
    """
    if not members:
        return
    named = row.pop(f"{kind}s", None) or row.pop(kind, None) or []
    by_base = {name.rpartition("/")[2]: content for name, content in members.items()}
    wanted = [
        str(name).rpartition("/")[2] for name in (named if isinstance(named, list) else [named])
    ]
    contents = (
        [by_base[name] for name in wanted]
        if wanted and all(name in by_base for name in wanted)
        else list(members.values())
    )
    row.pop(kind, None)
    row[kind if len(contents) == 1 else f"{kind}s"] = (
        contents[0] if len(contents) == 1 else contents
    )


def _read(content: Slice | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()
