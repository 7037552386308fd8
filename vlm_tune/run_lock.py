"""A lock that allows one run per folder, ends with its process and names its owner."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from vlm_tune.errors import TrainingError
from vlm_tune.paths import writing

NAME = "run.lock"
REFRESH = 30.0
STALE = 300.0
"""Seconds after which a lock is touched, and after which an untouched one counts as abandoned.

The latter is for locks of other hosts.
"""

_held: set[Path] = set()


@contextmanager
def run_lock(run: Path) -> Iterator[str | None]:
    """Context that holds the folder's lock.

    Yields:
        A note if the lock of a dead process was taken over, else None.

    Raises:
        TrainingError: another process, which the message names, or this one holds the lock.
    """
    with writing(run, "the output folder"):
        run.mkdir(parents=True, exist_ok=True)
    path = run.resolve() / NAME
    if path in _held:
        raise TrainingError(f"{run} is in use by this very process")
    with writing(path, "the run's lock"):
        descriptor, before = _taken(run, path)
    _held.add(path)
    ended = threading.Event()
    threading.Thread(target=_refresh, args=(path, ended), name="lock", daemon=True).start()
    try:
        yield (
            None
            if before is None
            else f"the lock of {_who(before)} is taken over: that process is gone"
        )
    finally:
        ended.set()
        _held.discard(path)
        path.unlink(missing_ok=True)
        os.close(descriptor)


def check_lock(run: Path) -> None:
    """Raises `TrainingError` if another process of this host runs in the folder; takes no lock."""
    path = run / NAME
    if path.is_file() and path.resolve() not in _held:
        descriptor = os.open(path, os.O_RDWR)
        try:
            if not _locks(descriptor):
                raise _refusal(run, _read(descriptor))
        finally:
            os.close(descriptor)


def _taken(run: Path, path: Path) -> tuple[int, dict[str, Any] | None]:
    """Locks the file and writes this process into it; returns its descriptor and earlier owner."""
    while True:
        # A record lock is not inherited by worker processes, which outlive a killed run for some
        # seconds.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            free = _locks(descriptor)
            before = _read(descriptor)
            if free and (not path.exists() or os.fstat(descriptor).st_ino != path.stat().st_ino):
                os.close(descriptor)
                continue  # its owner has just removed it
            # A truncated file names no host; an owner on this host keeps it locked.
            elsewhere = (
                before is not None
                and before.get("host", socket.gethostname()) != socket.gethostname()
            )
            if not free or (elsewhere and time.time() - path.stat().st_mtime < STALE):
                raise _refusal(run, before)
        except TrainingError:
            os.close(descriptor)
            raise
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.time()}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        return descriptor, before


def _locks(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _read(descriptor: int) -> dict[str, Any] | None:
    """Returns the owner that the lock names: {} where that is not JSON, None where it is empty."""
    text = os.pread(descriptor, 1000, 0)
    try:
        owner = json.loads(text) if text else None
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else None


def _who(owner: dict[str, Any]) -> str:
    started = owner.get("started")
    since = ""
    if isinstance(started, int | float) and 0 <= started < 1e11:
        since = f" since {datetime.fromtimestamp(started):%Y-%m-%d %H:%M:%S}"
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}{since}"


def _refusal(run: Path, owner: dict[str, Any] | None) -> TrainingError:
    return TrainingError(
        f"{run} is in use by {_who(owner or {})}; wait for it, stop it, or choose another output. "
        f"({NAME} of a host that is gone is free {STALE / 60:.0f} minutes after its last sign of "
        f"life)"
    )


def _refresh(path: Path, ended: threading.Event) -> None:
    while not ended.wait(REFRESH):
        try:
            os.utime(path)
        except OSError:
            return
