"""Checksums of cached files: computed once on writing, compared whenever a cache is opened.

They detect damage (flipped bits, cut files), not malice. XXH3 reads some gigabytes a second
(https://xxhash.com).
"""

from __future__ import annotations

import json
from pathlib import Path

NAME = "checksums.json"
"""The file of a folder that holds the checksums of its other files."""

_BLOCK = 1 << 20


def file_checksum(path: Path) -> str:
    """The 128-bit XXH3 of a file's bytes, as 32 hexadecimal digits. Raises `OSError`."""
    import xxhash

    state = xxhash.xxh3_128()
    block = bytearray(_BLOCK)
    view = memoryview(block)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            state.update(view[:size])
    return state.hexdigest()


def write_checksums(folder: Path) -> None:
    """Writes the checksums of all files directly in `folder`. Raises `OSError`."""
    checksums = {
        path.name: file_checksum(path) for path in sorted(folder.iterdir()) if path.is_file()
    }
    (folder / NAME).write_text(json.dumps(checksums))


def is_intact(folder: Path) -> bool:
    """Whether a folder holds the files that `write_checksums` saw, each with the same bytes."""
    try:
        checksums = json.loads((folder / NAME).read_bytes())
        files = {path.name for path in folder.iterdir()} - {NAME}
        return (
            isinstance(checksums, dict)
            and files == checksums.keys()
            and all(
                file_checksum(folder / name) == checksum for name, checksum in checksums.items()
            )
        )
    except (OSError, ValueError):  # JSON and UTF-8 that can't be decoded are ValueErrors
        return False
