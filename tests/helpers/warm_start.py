"""Commands of launchers that run in forks of the test's process, which has imported what they need.

A launcher starts `python -m vlm_tune.cli` in the environment that it makes. Where the folder of
`stand_in` is on PYTHONPATH, that is a small program which sends its environment, arguments, folder
and outputs to the test's process; a fork of it runs the command line there, and the small program
ends with the fork's exit code. Imports take several seconds a process otherwise.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from subprocess import Popen
from typing import Any

STAND_IN = """
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(os.environ["WARM_START"])
    message = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
    socket.send_fds(connection, [len(message).to_bytes(4)], [1, 2])
    connection.sendall(message)
    code = connection.recv(1)
sys.exit(code[0] if code else 1)
"""


@contextlib.contextmanager
def stand_in(folder: Path) -> Iterator[tuple[socket.socket, dict[str, str]]]:
    """The socket that stand-ins for `python -m vlm_tune.cli` come to, and their environment.

    They must be started in this folder, which is the current one within the context.
    """
    package = folder / "stand_in" / "vlm_tune" / "cli"
    package.mkdir(parents=True)
    for name in (package.parent / "__init__.py", package / "__init__.py"):
        name.touch()
    (package / "__main__.py").write_text(STAND_IN)
    with contextlib.chdir(folder), socket.socket(socket.AF_UNIX) as server:
        server.bind("warm")  # relative: a socket's path has at most 107 characters
        server.listen()
        server.settimeout(0.05)
        yield server, {"PYTHONPATH": str(folder / "stand_in"), "WARM_START": "warm"}


def serve(server: socket.socket, jobs: Sequence[Popen[Any]], seconds: float = 1200) -> int:
    """Runs what stand-ins ask for until all jobs have ended; how many there were."""
    running: dict[int, socket.socket] = {}
    count, deadline = 0, time.monotonic() + seconds
    try:
        while running or any(job.poll() is None for job in jobs):
            assert time.monotonic() < deadline, "a launcher hangs"
            with contextlib.suppress(TimeoutError):
                connection, _ = server.accept()
                connection.setblocking(True)
                running[_start(connection)] = connection
                count += 1
            for pid in list(running):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    with running.pop(pid) as connection, contextlib.suppress(OSError):
                        connection.sendall(bytes([os.waitstatus_to_exitcode(status) & 255]))
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return count


def _start(connection: socket.socket) -> int:
    """Forks a process that runs the command line as a stand-in asks."""
    size, outputs, _, _ = socket.recv_fds(connection, 4, 2)
    with connection.makefile("rb") as reader:
        arguments, environment, folder = json.loads(reader.read(int.from_bytes(size)))
    pid = os.fork()
    if pid == 0:
        code: Any = 1
        try:
            for descriptor, place in zip(outputs, (1, 2), strict=True):
                os.dup2(descriptor, place)
            sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
            sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(folder)
            _command_line(arguments)
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)
    for descriptor in outputs:
        os.close(descriptor)
    return pid


def _command_line(arguments: list[str]) -> None:
    from accelerate.state import AcceleratorState

    from vlm_tune.cli import main

    AcceleratorState._reset_state(reset_partial_state=True)
    sys.argv = ["vlm-tune", *arguments]
    main()
