"""Runs in processes of their own that can be signalled, filled and killed.

They are forks of the test's process, so that they start at once.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.tiny_models import parsed, with_tune
from vlm_tune.config.recipe import Recipe
from vlm_tune.errors import VlmTuneError

DROPOUT = """
tune:
  - {match: "tower.*", how: frozen}
  - {match: "connector.*", how: full}
  - {match: "llm.*", how: lora, r: 4, lora_dropout: 0.2, target_modules: all-linear}
train:"""


def runs(tiny_recipe: Callable[..., str], output: str = "run", **changes: Any) -> Recipe:
    """A decoder with LoRA and dropout on eight rows, a checkpoint each step and no validation."""
    common = {
        "data__validation": [],
        "data__workers": 0,
        "train__steps": 4,
        "train__log_every": 1,
        "evaluate__samples": 0,
    }
    saves = {"train__checkpoints": {"every": 1, "keep": 10}}
    return parsed(
        with_tune(tiny_recipe("causal", output=output), DROPOUT), **(common | saves | changes)
    )


def stage_of(run: Path) -> Path:
    return run / "stages" / "1-main"


def hidden(run: Path) -> list[str]:
    """Folders in the making that were left behind."""
    return [str(path) for path in run.rglob(".*") if path.is_dir()]


_stores: dict[int, Any] = {}
"""By a process's pid the store that it meets the others in, held here until all have ended."""


def start(act: Callable[[], Any], output: Path, *, ranks: int = 1) -> list[int]:
    """Forks `ranks` processes that call `act` as one launch.

    What rank n prints goes to the file `said` with .n added.
    """
    reading, writing = os.pipe()
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.close(writing)
            port = int(os.read(reading, 16)) if ranks > 1 else 0
            _run(act, Path(f"{output}.{rank}"), rank, ranks, port)
        pids.append(pid)
    if ranks > 1:
        from torch.distributed import TCPStore

        # Held by this process from the moment the port is chosen: a port that is only known to be
        # free can be another test's by the time rank 0 listens, and then ranks of two jobs meet and
        # wait for ever. After the forks, as a store has threads.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        _stores.update(dict.fromkeys(pids, store))
        for _ in pids:
            os.write(writing, f"{store.port:<16}".encode())
    os.close(writing)
    os.close(reading)
    return pids


def _run(act: Callable[[], Any], output: Path, rank: int, ranks: int, port: int) -> None:
    from accelerate.state import AcceleratorState

    code = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for place in (1, 2):
            os.dup2(descriptor, place)
        sys.stdout = sys.__stdout__ = sys.stderr = sys.__stderr__ = os.fdopen(
            2, "w", buffering=1, closefd=False
        )
        # Where every thread is, if `ended` finds that this process hangs.
        faulthandler.register(signal.SIGUSR1, file=2)
        AcceleratorState._reset_state(reset_partial_state=True)
        if ranks > 1:
            address = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            os.environ.update(
                {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), **address}
            )
        act()
        code = 0
    except VlmTuneError as error:
        print(f"{type(error).__name__}: {error}")
        code = error.exit_code
    except SystemExit as error:  # of the command line
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


STILL, IDLE = 240.0, 1.0
"""Processes that together computed for less than IDLE seconds in STILL count as hanging.

A busy machine slows them down, but not so far.
"""


def ended(pids: list[int]) -> list[int]:
    """The exit codes of processes; -9 for a killed one.

    Kills those that hang, once they have said where, and fails.
    """
    codes: dict[int, int] = {}
    seen, since = 0.0, time.monotonic()
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (waited := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(waited[1])
                _stores.pop(pid, None)
                since = time.monotonic()
        time.sleep(0.02)
        if time.monotonic() - since > STILL:
            left = [pid for pid in pids if pid not in codes]
            now = sum(map(_computed, left))
            if now - seen < IDLE:
                for number in (signal.SIGUSR1, signal.SIGKILL):
                    for pid in left:
                        os.kill(pid, number)
                    time.sleep(1)
                raise AssertionError("hangs; where its threads were is in what it said")
            seen, since = now, time.monotonic()
    return [codes[pid] for pid in pids]


def _computed(pid: int) -> float:
    """Seconds of processor time that a process has taken."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def until(condition: Callable[[], Any], timeout: float = 400) -> None:
    """Returns once a condition of another process holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


# --- killed at a system call -------------------------------------------------------------------

CALLS = {
    "x86_64": {"write": 1, "open": 2, "pwrite": 18, "writev": 20, "rename": 82, "mkdir": 83,
               "rmdir": 84, "creat": 85, "unlink": 87, "fsync": 74, "fdatasync": 75, "truncate": 76,
               "ftruncate": 77, "openat": 257, "mkdirat": 258, "unlinkat": 263, "renameat": 264,
               "renameat2": 316, "fallocate": 285, "copy_file_range": 326, "sendfile": 40,
               "close": 3},
    "aarch64": {"write": 64, "pwrite": 68, "writev": 66, "fsync": 82, "fdatasync": 83,
                "truncate": 45, "ftruncate": 46, "openat": 56, "mkdirat": 34, "unlinkat": 35,
                "renameat": 38, "renameat2": 276, "fallocate": 47, "copy_file_range": 285,
                "sendfile": 71, "close": 57},
}  # fmt: skip
TRACEME, CONTINUE_TO_CALL, SET_OPTIONS, GET_CALL = 0, 24, 0x4200, 0x420E
EXIT_KILL = 0x100000


def stopped_at(act: Callable[[], None], visit: Callable[[int], bool]) -> None:
    """Calls `act` in a fork that is stopped before each of its file operations.

    At each stop `visit` is called with its number.

    The fork is killed with SIGKILL where that returns True: no step of it comes after that.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    calls, seen = set(CALLS[platform.machine()].values()), 0
    pid = os.fork()
    if pid == 0:
        gc.disable()  # a collection would touch, and so copy, all that the parent holds
        libc.ptrace(TRACEME, 0, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        act()
        os._exit(0)
    os.waitpid(pid, 0)
    assert libc.ptrace(SET_OPTIONS, pid, None, EXIT_KILL | 1) == 0
    info = ctypes.create_string_buffer(88)
    passed = 0
    while True:
        libc.ptrace(CONTINUE_TO_CALL, pid, None, passed)
        status = os.waitpid(pid, 0)[1]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return
        stopped = os.WSTOPSIG(status)
        passed = 0 if stopped == signal.SIGTRAP | 0x80 else stopped
        if passed:
            continue
        libc.ptrace(GET_CALL, pid, 88, info)
        if info.raw[0] == 1 and int.from_bytes(info.raw[24:32], sys.byteorder) in calls:
            if visit(seen):
                os.kill(pid, signal.SIGKILL)
                assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
                return
            seen += 1
