"""The media of a shard's rows, and the files that these depend on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vlm_tune.data.prepare.arrow_store import MediaRow
from vlm_tune.data.prepare.duplicates import ImageInfo
from vlm_tune.data.types import Media, Slice, Video


class MediaTable:
    """The distinct media of a shard; encoded bytes are written to its blob."""

    def __init__(self, blob: Path, final: Path) -> None:
        self.rows: list[MediaRow] = []
        self.stamps: dict[str, int] = {}
        self._numbers: dict[Media, int] = {}
        self._blob = blob
        self._final = final
        self._file = None
        self._size = 0
        self._placed: dict[bytes, Slice] = {}

    def number(self, media: Media) -> int:
        return self._numbers[media]

    def note(self, file: Path | None) -> None:
        """Records the modification time of a file that the rows depend on, usable or not."""
        if file is not None and str(file) not in self.stamps:
            self.stamps[str(file)] = file_stamp(file)

    def add(self, media: Media, info: ImageInfo) -> int:
        number = self._numbers.get(media)
        if number is None:
            number = self._numbers[media] = len(self.rows)
            self.rows.append(MediaRow(self._stored(media), info))
        return number

    def _stored(self, media: Media) -> Media:
        """The item with its bytes in the blob."""
        if isinstance(media.source, Video):
            return replace(media, source=media.source.with_frames(self._stored))
        source = self._place(media.source) if isinstance(media.source, bytes) else media.source
        return replace(media, source=source)

    def _place(self, data: bytes) -> Slice:
        placed = self._placed.get(data)
        if placed is None:
            self._file = self._file or self._blob.open("wb")
            self._file.write(data)
            placed = self._placed[data] = Slice(self._final, self._size, len(data))
            self._size += len(data)
        return placed

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def file_stamp(path: Path) -> int:
    """The modification time of a file in nanoseconds; -1 if it does not exist."""
    try:
        return path.stat().st_mtime_ns
    # A NUL byte in the name is a ValueError.
    except (OSError, ValueError):
        return -1
