"""The machine's figures: memory of processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_tune.errors import RecipeError
from vlm_tune.resources import cache_folder, cache_limit, check_cache, peak_resident_memory

MB = 1_000_000


def test_a_process_does_not_report_the_memory_of_the_one_that_started_it() -> None:
    large = b"x" * (300 * MB)
    assert peak_resident_memory() > len(large)
    program = (
        "import resource; from vlm_tune.resources import peak_resident_memory\n"
        "print(peak_resident_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    peak, inherited = map(int, ended.stdout.split())
    assert peak < 150 * MB
    assert inherited > 250 * MB, "the system no longer hands the peak down"
    assert len(large) == 300 * MB


def test_the_memory_of_a_process_that_ended_is_an_error() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ProcessLookupError):
        peak_resident_memory(pid)
    os.waitpid(pid, 0)
    with pytest.raises(ProcessLookupError):
        peak_resident_memory(pid)


def test_an_empty_variable_of_the_cache_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_TUNE_CACHE", "")
    monkeypatch.setenv("VLM_TUNE_CACHE_GB", "")
    assert cache_folder("features") == Path.home() / ".cache" / "vlm_tune" / "features"
    assert cache_limit() == 100 * 10**9


@pytest.mark.parametrize("size", ["10GB", "-1", "nan", "inf", " "])
def test_a_size_of_the_cache_that_is_none_is_an_error_before_it_is_used(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLM_TUNE_CACHE_GB", size)
    with pytest.raises(RecipeError, match=r"VLM_TUNE_CACHE_GB: .* is not a size in GB"):
        check_cache(tmp_path / "features")
