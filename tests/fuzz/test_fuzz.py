"""A short run of the fuzzer; `python tests/fuzz/run.py` is the long one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")


COUNTS = {"recipe": 60, "override": 30, "row": 20, "training": 8, "command": 15, "python": 30, "folder": 6}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), COUNTS.items())
def test_no_input_ends_in_a_traceback(kind: str, count: int, tmp_path: Path) -> None:
    """Cases of one kind end in success, or in an error that says where the fault is."""
    command = [sys.executable, str(RUN), "--cases", str(count), "--processes", "1", "--kind", kind, "--json", str(tmp_path / "report.json")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    report = json.loads((tmp_path / "report.json").read_text()) if (tmp_path / "report.json").is_file() else None
    assert ended.returncode == 0, json.dumps(report["faults"], indent=1)[:6000] if report else ended.stderr[-3000:]
    assert report is not None
    counts = report["by_kind"][kind]
    assert counts["cases"] == count
    assert counts["reached a training step"] >= {"training": count // 3, "row": count // 8}.get(kind, 0)
