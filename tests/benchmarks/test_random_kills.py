"""The random-kill benchmark with few kills.

It runs, and a run killed at random ends as the one that was not.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.random_kills import kill_and_compare


@pytest.mark.slow
def test_a_run_killed_three_times_is_bit_equal(tmp_path: Path) -> None:
    report = kill_and_compare(tmp_path, kills=3, steps=40, seed=1)
    assert report["kills"] == 3
    assert report["tensors"] > 50
    assert (report["model"], report["state"], report["trace"]) == ([], [], True)
