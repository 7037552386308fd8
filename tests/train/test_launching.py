"""`--processes`: what ranks find in the environment, and how they end.

Exit codes, signals that are passed on, and no process left behind.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from vlm_tune import launching
from vlm_tune.launching import launch

READY = (
    "import os, signal, sys, time; from pathlib import Path; rank = os.environ['RANK']; "
    "folder = Path(sys.argv[1]); "
)
"""How a rank's program begins."""


def ranks(code: str, folder: Path, processes: int = 2) -> int:
    """The exit code of a job whose ranks run some code."""
    return launch([sys.executable, "-c", READY + code, str(folder)], processes)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_ranks_find_what_torchrun_would_set(tmp_path: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert (
        ranks(
            f"(folder / rank).write_text(' '.join(os.environ[name] for name in {names}))", tmp_path
        )
        == 0
    )
    first, second = ((tmp_path / rank).read_text().split() for rank in "01")
    assert first[:5] == ["0", "0", "2", "2", "127.0.0.1"]
    assert second[:5] == ["1", "1", "2", "2", "127.0.0.1"]
    assert first[5] == second[5]


def test_no_other_process_is_given_the_port_before_rank_0_listens(tmp_path: Path) -> None:
    assert (
        ranks(
            "import socket\n"
            "try: socket.socket().bind(('127.0.0.1', int(os.environ['MASTER_PORT'])))\n"
            "except OSError as error: (folder / rank).write_text(error.strerror)\n",
            tmp_path,
        )
        == 0
    )
    assert {path.read_text() for path in tmp_path.iterdir()} == {"Address already in use"}


@pytest.mark.slow
@pytest.mark.parametrize("libuv", [True, False])
def test_the_ranks_meet_at_the_port(tmp_path: Path, libuv: bool) -> None:
    code = (
        "from torch.distributed import TCPStore\n"
        "port, first = int(os.environ['MASTER_PORT']), rank == '0'\n"
        f"store = TCPStore(os.environ['MASTER_ADDR'], port, 2, first, use_libuv={libuv})\n"
        "store.set(rank, rank)\n"
        "(folder / rank).write_bytes(store.get('1' if first else '0'))\n"
        "store.add('done', 1)\n"
        "while first and store.add('done', 0) < 2: time.sleep(0.01)\n"
    )
    assert ranks(code, tmp_path) == 0
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["1", "0"]


def test_the_first_failure_is_the_jobs_and_ends_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launching, "GRACE", 0.2)
    wait = (
        "(folder / rank).write_text(str(os.getpid())); sys.exit(3) if rank == '1' else "
        "time.sleep(60)"
    )
    assert ranks(wait, tmp_path) == 3
    assert "killed after 0.2 s of waiting: process 0" in capsys.readouterr().err
    assert not alive(int((tmp_path / "0").read_text()))


def test_a_killed_rank_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ranks("rank == '1' and os.kill(os.getpid(), signal.SIGKILL)", tmp_path) == 5
    assert "process 1 of 2 was ended by SIGKILL" in capsys.readouterr().err


def test_sigterm_goes_on_to_every_rank(tmp_path: Path) -> None:
    """The last rank that is ready sends it to the launcher.

    Each ends as a run does that was asked to stop.
    """
    code = (
        "signal.signal(signal.SIGTERM, lambda *_: ((folder / f'asked-{rank}').touch(), "
        "sys.exit(130)));\n"
        "(folder / rank).touch()\n"
        "while rank == '1' and not (folder / '0').exists(): time.sleep(0.01)\n"
        "rank == '1' and os.kill(os.getppid(), signal.SIGTERM)\n"
        "while True: time.sleep(0.01)\n"
    )
    before = signal.getsignal(signal.SIGTERM)
    assert ranks(code, tmp_path) == 130
    assert {path.name for path in tmp_path.glob("asked-*")} == {"asked-0", "asked-1"}
    assert signal.getsignal(signal.SIGTERM) is before
