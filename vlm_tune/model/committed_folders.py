"""Folders that are complete or absent: written atomically, verified by their manifest when read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from vlm_tune.errors import ModelError
from vlm_tune.run_folder import MANIFEST, strangers

TEMPORARY = ".tmp-"
REPLACED = ".old-"
"""Infixes in the names of folders that are being written, and of folders that they replace."""


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Writes a folder atomically: under a temporary name, synced, with a manifest, then renamed.

    An existing folder is replaced only when the new one is complete; its files that no manifest
    lists are moved to the new one. A failure leaves no partial folder. What a killed process leaves
    is repaired by `recover_folders`.

    Args:
        target: the folder.
        write: writes all files into the temporary folder that it is called with.
    """
    target = target.resolve()  # "." has no name to rename
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}{TEMPORARY}{os.getpid()}"
    old = target.parent / f".{target.name}{REPLACED}{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        write(temporary)
        write_manifest(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        _sync(target.parent)
        if old.exists():
            _keep_strangers(old, target)
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        raise


def write_manifest(folder: Path) -> None:
    """Writes a folder's manifest: the size and the sha256 of each of its files."""
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1))


def _keep_strangers(old: Path, target: Path) -> None:
    """Moves the files that no manifest lists from a folder to the one that replaced it."""
    for path in strangers(old):
        destination = target / path.relative_to(old)
        if not os.path.lexists(destination):
            destination.parent.mkdir(parents=True, exist_ok=True)
            path.rename(destination)


def recover_folders(parent: Path) -> None:
    """Cleans up after a killed `commit_folder` or `remove_folder`.

    A replaced folder without its successor is restored; partial folders are removed. To be called
    only by the process that may write to `parent`.
    """
    for left in [*parent.glob(f".*{REPLACED}*"), *parent.glob(f".*{TEMPORARY}*")]:
        name, _, _ = left.name[1:].rpartition(REPLACED)
        if name and not (parent / name).exists():
            left.rename(parent / name)
        else:
            shutil.rmtree(left, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder atomically: it is renamed before its files are deleted."""
    leaving = folder.parent / f".{folder.name}{TEMPORARY}{os.getpid()}"
    folder.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def verify_folder(folder: Path) -> None:
    """Raises `ModelError` unless every file of the manifest exists with its size and sha256."""
    try:
        files = {
            str(name): (int(entry["size"]), entry["sha256"])
            for name, entry in json.loads((folder / MANIFEST).read_text())["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(
            f"{folder}: no complete model (its manifest.json is missing or unreadable)"
        ) from None
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise ModelError(f"{folder}: {name} is missing or truncated")
        if _digest(path) != sha256:
            raise ModelError(f"{folder}: {name} is not what was written (sha256 differs)")


def is_whole(folder: Path) -> bool:
    """Whether the folder has all files of its manifest, unchanged."""
    try:
        verify_folder(folder)
    except ModelError:
        return False
    return True
