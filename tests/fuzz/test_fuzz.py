"""A short run of the fuzzer; `python tests/fuzz/run.py` is the long one."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")


COUNTS = {
    "recipe": 60,
    "override": 30,
    "row": 20,
    "training": 8,
    "command": 15,
    "python": 30,
    "folder": 6,
}


@pytest.mark.slow
def test_no_input_ends_in_a_traceback(tmp_path: Path) -> None:
    """Cases of all kinds end in success, or in an error that says where the fault is."""
    mix = ",".join(f"{kind}:{count}" for kind, count in COUNTS.items())
    report_path = tmp_path / "report.json"
    options = {
        "--cases": str(sum(COUNTS.values())),
        "--processes": "1",
        "--kind": mix,
        "--json": str(report_path),
    }
    command = [sys.executable, str(RUN), *chain(*options.items())]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    report = json.loads(report_path.read_text()) if report_path.is_file() else None
    assert ended.returncode == 0, (
        json.dumps(report["faults"], indent=1)[:6000] if report else ended.stderr[-3000:]
    )
    assert report is not None
    assert {kind: counts["cases"] for kind, counts in report["by_kind"].items()} == COUNTS
    assert report["by_kind"]["training"]["reached a training step"] >= COUNTS["training"] // 3
    assert report["by_kind"]["row"]["reached a training step"] >= COUNTS["row"] // 8
