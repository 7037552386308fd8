"""A lock that allows one run per folder, ends with its process and names its owner."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from vlm_tune.errors import TrainingError
from vlm_tune.paths import writing
from vlm_tune.quoting import cut

NAME = "run.lock"
HOLDER = "run.lock.json"
"""The file that is locked, and the one beside it that names the process which holds the lock."""

WHAT = "the run's lock"
REFRESH = 30.0
STALE = 300.0
"""Seconds after which a lock is touched, and after which an untouched one counts as abandoned.

The latter is for locks of other hosts.
"""
PATIENCE = 0.2
"""Seconds to try: its owner may be removing the file, or another process looking at it."""

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
    folder = run.resolve()
    if folder in _held:
        raise TrainingError(f"{run} is in use by this process")
    with ExitStack() as stack:
        with writing(folder / NAME, WHAT):
            stack.enter_context(_locked(run))
            before = _holder(run)
            # Where the file system does not share locks between hosts, this one says nothing of
            # theirs. A damaged name is no other host's: an owner on this host would hold the lock.
            elsewhere = (before or {}).get("host", socket.gethostname()) != socket.gethostname()
            if elsewhere and time.time() - (folder / HOLDER).stat().st_mtime < STALE:
                raise _refusal(run)
            (folder / HOLDER).write_text(json.dumps(_this_process()))
        for name in (NAME, HOLDER):
            stack.callback((folder / name).unlink, missing_ok=True)
        _held.add(folder)
        stack.callback(_held.discard, folder)
        ended = threading.Event()
        stack.callback(ended.set)
        threading.Thread(
            target=_refresh, args=(folder / HOLDER, ended), name="lock", daemon=True
        ).start()
        yield (
            None
            if before is None
            else f"the lock of {_who(before)} is taken over: its process no longer runs"
        )


def check_lock(run: Path) -> None:
    """Raises `TrainingError` if another process of this host runs in the folder; keeps no lock."""
    if (run / NAME).is_file() and run.resolve() not in _held:
        with writing(run / NAME, WHAT), _locked(run):
            pass


def _locked(run: Path) -> AcquireReturnProxy[Any]:
    """Locks the file; the context that is returned ends the lock. Raises `TrainingError`."""
    # Worker processes, which outlive a killed run for some seconds, do not inherit the lock:
    # filelock closes its descriptor in forks. Its substitute for file systems without locks let
    # two processes in (3.32.7), so there is none.
    lock = FileLock(run.resolve() / NAME, timeout=PATIENCE, fallback_to_soft=False)
    try:
        return lock.acquire()
    except Timeout:
        raise _refusal(run) from None


def _this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": time.time(),
        "command": cut(shlex.join(sys.argv)),
    }


def _holder(run: Path) -> dict[str, Any] | None:
    """Returns the process that the lock names: {} where that is no JSON, None where it is empty."""
    try:
        text = (run / HOLDER).read_bytes()
        owner = json.loads(text) if text else None
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else None


def _who(owner: dict[str, Any]) -> str:
    started = owner.get("started")
    command = owner.get("command")
    since = ""
    if isinstance(started, int | float) and 0 <= started < 1e11:
        since = f" since {datetime.fromtimestamp(started):%Y-%m-%d %H:%M:%S}"
    running = f" ({cut(command)})" if isinstance(command, str) else ""
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}{since}{running}"


def _refusal(run: Path) -> TrainingError:
    return TrainingError(
        f"{run} is in use by {_who(_holder(run) or {})}; wait for it, stop it, or choose another "
        f"output. ({NAME} of a host that is gone is free {STALE / 60:.0f} minutes after its last "
        f"sign of life)"
    )


def _refresh(path: Path, ended: threading.Event) -> None:
    while not ended.wait(REFRESH):
        try:
            os.utime(path)
        except OSError:
            return
