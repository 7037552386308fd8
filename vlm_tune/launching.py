"""Starts several processes on this machine, as `vlm-tune sft --processes N` does.

PyTorch's launcher, torchrun, does not replace it (measured: dev/log.md). Once it has passed a
signal on, it gives no exit codes of ranks, so a stop that could be saved and one that could not
look alike. It sends signals to the ranks' worker processes too, and kills what takes longer to stop
than a limit. When one rank fails, it stops the others before they can say what they met.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from vlm_tune.errors import EXIT_TRAINING
from vlm_tune.resources import usable_cores

GRACE = 10.0
"""Seconds that the other processes have to end by themselves once one has failed.

Most often all find the same fault.
"""
POLL = 0.1
PARENT_DIED = 1
"""prctl's option for the signal that a process gets when its parent is gone."""


def launch(command: Sequence[str], processes: int) -> int:
    """Runs a command as the ranks of one job and returns the job's exit code.

    That is the code of the first rank that failed, or 5 if a signal ended it. SIGINT and SIGTERM
    are passed on to every rank. When one fails, the others are killed after a grace period.
    """
    with _reserved_port() as port:
        return _launch(command, processes, port)


@contextmanager
def _reserved_port() -> Iterator[int]:
    """Context with a free TCP port that no other process is given while it lasts.

    The socket stays bound and does not listen: the system assigns its port to nobody, and rank 0
    may listen there, since its store sets SO_REUSEADDR too.
    """
    with socket.socket() as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("", 0))
        yield bound.getsockname()[1]


def _launch(command: Sequence[str], processes: int, port: int) -> int:
    """Runs the ranks, which meet at a port, and returns the job's exit code."""
    threads = str(max(usable_cores() // processes, 1))
    common = {
        "OMP_NUM_THREADS": threads,
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks: list[subprocess.Popen[Any]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in range(processes):
            environment = common | {"RANK": str(number), "LOCAL_RANK": str(number)}
            # Each rank has its own session: a terminal's Ctrl-C comes here alone, and is passed on.
            # So it reaches each rank once.
            ranks.append(
                subprocess.Popen(
                    command, env=environment, start_new_session=True, preexec_fn=_end_with_parent
                )
            )
        return _wait(ranks)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PARENT_DIED, signal.SIGTERM)


def _wait(ranks: Sequence[subprocess.Popen[Any]]) -> int:
    """Waits for all ranks and returns the exit code of the job."""
    failed = 0
    deadline = None
    while True:
        codes = [rank.poll() for rank in ranks]
        if deadline is None and any(codes):
            number = next(number for number, code in enumerate(codes) if code)
            failed = codes[number] or 0
            deadline = time.monotonic() + GRACE
            if failed < 0:
                print(
                    f"process {number} of {len(ranks)} was ended by {signal.Signals(-failed).name}",
                    file=sys.stderr,
                )
        left = [number for number, code in enumerate(codes) if code is None]
        if not left:
            return failed if failed >= 0 else EXIT_TRAINING
        if deadline is not None and time.monotonic() > deadline:
            print(
                f"killed after {GRACE:g} s of waiting: process {', '.join(map(str, left))}",
                file=sys.stderr,
            )
            for number in left:
                ranks[number].kill()
            deadline = float("inf")
        time.sleep(POLL)
