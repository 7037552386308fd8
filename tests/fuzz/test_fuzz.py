"""A short run of the fuzzer; `python tests/fuzz/run.py` is the long one."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pytest

from tests.fuzz import run
from tests.helpers import tiny_models  # noqa: F401  (what every fork of this process needs)

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
def test_no_input_ends_in_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases of all kinds end in success, or in an error that says where the fault is."""
    # The fuzzer's workplace sets it.
    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "cache"))
    mix = ",".join(f"{kind}:{count}" for kind, count in COUNTS.items())
    report_path = tmp_path / "report.json"
    options = {
        "--cases": str(sum(COUNTS.values())),
        "--processes": "1",
        "--kind": mix,
        "--json": str(report_path),
    }
    code = run.main([*chain(*options.items())])
    assert report_path.is_file()
    report = json.loads(report_path.read_text())
    assert code == 0, json.dumps(report["faults"], indent=1)[:6000]
    assert {kind: counts["cases"] for kind, counts in report["by_kind"].items()} == COUNTS
    assert report["by_kind"]["training"]["reached a training step"] >= COUNTS["training"] // 3
    assert report["by_kind"]["row"]["reached a training step"] >= COUNTS["row"] // 8
