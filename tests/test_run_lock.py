"""The lock of a run's folder: who is refused, what the message names, and what is taken over."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vlm_tune import run_lock as locking
from vlm_tune.errors import RecipeError, TrainingError
from vlm_tune.run_lock import HOLDER, NAME, STALE, check_lock, run_lock

HOLDS = (
    "import os, sys, time; from pathlib import Path; from vlm_tune.run_lock import run_lock\n"
    "with run_lock(Path(sys.argv[1])):\n"
    "    worker = os.fork()\n"
    "    if worker == 0:\n"
    "        while True: time.sleep(60)\n"
    "    print(worker, flush=True)\n"
    "    sys.stdin.read()\n"
    "    os.kill(worker, 9)\n"
)
"""A program that holds a folder's lock until its input ends, and has a worker process."""


@contextmanager
def holding(run: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that holds the lock, and its worker's pid; both end with the context."""
    command = [sys.executable, "-c", HOLDS, str(run)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        worker = int(holder.stdout.readline())
        try:
            yield holder, worker
        finally:
            holder.kill()
            os.kill(worker, signal.SIGKILL)


def holder_on(run: Path, host: str, age: float) -> None:
    """Leaves the files of a lock whose holder gave its last sign of life `age` seconds ago."""
    (run / NAME).touch()
    (run / HOLDER).write_text(json.dumps({"host": host, "pid": 7, "started": 1.7e9}))
    os.utime(run / HOLDER, (time.time() - age,) * 2)


def test_another_process_is_refused_with_the_holders_pid_host_start_and_command(
    tmp_path: Path,
) -> None:
    with holding(tmp_path) as (holder, _):
        named = (
            rf"is in use by process {holder.pid} on {socket.gethostname()} "
            rf"since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d \(-c {tmp_path}\); wait for it"
        )
        for refused in (lambda: check_lock(tmp_path), lambda: run_lock(tmp_path).__enter__()):
            with pytest.raises(TrainingError, match=named):
                refused()


def test_the_lock_of_a_killed_process_is_taken_over_while_its_workers_live(tmp_path: Path) -> None:
    with holding(tmp_path) as (holder, worker):
        holder.kill()
        holder.wait()
        os.kill(worker, 0)
        check_lock(tmp_path)
        with run_lock(tmp_path) as note:
            assert note is not None
            assert note.startswith(f"the lock of process {holder.pid} on ")
            assert note.endswith(" is taken over: its process no longer runs")


def test_nothing_of_a_lock_remains_after_it(tmp_path: Path) -> None:
    run = tmp_path / "new" / "run"
    for _ in range(2):
        with run_lock(run) as note:
            assert note is None
            assert {path.name for path in run.iterdir()} == {NAME, HOLDER}
            assert json.loads((run / HOLDER).read_text())["pid"] == os.getpid()
            check_lock(run)  # of this process
            with (
                pytest.raises(TrainingError, match="in use by this process"),
                run_lock(run),
            ):
                pass
        assert list(run.iterdir()) == []


def test_an_error_in_the_run_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no space"), run_lock(tmp_path):
        raise OSError(errno.ENOSPC, "no space")
    with run_lock(tmp_path) as note:
        assert note is None


def test_a_folder_that_is_deleted_meanwhile_is_no_error_of_the_lock(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with run_lock(run):
        for path in run.iterdir():
            path.unlink()
        run.rmdir()
    assert not run.exists()


def test_a_lock_of_another_host_is_free_after_its_last_sign_of_life(tmp_path: Path) -> None:
    """Its file may lie where locks of other hosts are not seen."""
    holder_on(tmp_path, "elsewhere", STALE - 30)
    with (
        pytest.raises(TrainingError, match="in use by process 7 on elsewhere since 2023-"),
        run_lock(tmp_path),
    ):
        pass
    assert json.loads((tmp_path / HOLDER).read_text())["host"] == "elsewhere"
    holder_on(tmp_path, "elsewhere", STALE + 30)
    with run_lock(tmp_path) as note:
        assert note is not None and "process 7 on elsewhere" in note
    # A process of this host that is gone can hold nothing, however short that is.
    holder_on(tmp_path, socket.gethostname(), 0)
    with run_lock(tmp_path) as note:
        assert note is not None and "process 7 on " in note


def test_a_living_holder_is_touched_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locking, "REFRESH", 0.01)
    with run_lock(tmp_path):
        os.utime(tmp_path / HOLDER, (0, 0))
        deadline = time.monotonic() + 60
        while (tmp_path / HOLDER).stat().st_mtime < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / HOLDER).stat().st_mtime > 1


@pytest.mark.parametrize("text", [b"", b'{"pid": 1', b"\xff\xfe", b"null", b"[1]", b'{"pid": {}}'])
def test_a_damaged_name_of_the_holder_stops_nobody(tmp_path: Path, text: bytes) -> None:
    (tmp_path / NAME).touch()
    (tmp_path / HOLDER).write_bytes(text)
    check_lock(tmp_path)
    with run_lock(tmp_path):
        assert json.loads((tmp_path / HOLDER).read_text())["pid"] == os.getpid()


def test_a_damaged_name_of_a_living_holder_is_said_as_unknown(tmp_path: Path) -> None:
    with holding(tmp_path):
        (tmp_path / HOLDER).write_bytes(b'{"pid": ')
        with pytest.raises(TrainingError, match=r"in use by process \? on \?; wait for it"):
            check_lock(tmp_path)


def test_a_lock_that_its_holder_removes_at_that_moment_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever opened the file before it was removed locks a file that nobody else sees."""
    path = tmp_path / NAME
    removed = []

    def remove_first(lock: object) -> object:
        def locked(*arguments: int) -> None:
            if not removed:
                removed.append(path.unlink())
            lock(*arguments)  # type: ignore[operator]

        return locked

    for name in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, name, remove_first(getattr(fcntl, name)))
    path.touch()
    with run_lock(tmp_path):
        assert removed
        assert path.exists()


def test_a_folder_that_can_not_be_written_is_told_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(RecipeError, match="the output folder can't be written"),
        run_lock(tmp_path / "file" / "run"),
    ):
        pass
    real = os.open

    def read_only(path: str, flags: int, *rest: int, **named: int | None) -> int:
        if os.fspath(path).startswith(str(tmp_path)) and flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", read_only)
    with (
        pytest.raises(RecipeError, match="the run's lock can't be written: read-only file system"),
        run_lock(tmp_path),
    ):
        pass


def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs could not be told apart there."""

    def absent(*arguments: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", absent)
    with (
        pytest.raises(RecipeError, match="the run's lock can't be written: function not implem"),
        run_lock(tmp_path),
    ):
        pass
