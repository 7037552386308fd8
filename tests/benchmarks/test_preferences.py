"""The rows and the steps of the comparison of preference tuning."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import material
from benchmarks.turns import Contender
from vlm_tune.data.sources.easy_vqa import KINDS, answer_type


@pytest.mark.parametrize("each", [1, 4])
def test_pairs_are_two_answers_of_one_kind_to_a_question(each: int, tmp_path: Path) -> None:
    material.write_preferences(tmp_path, 6, each)
    rows = [json.loads(line) for line in (tmp_path / "preferences.jsonl").read_text().splitlines()]
    assert len(rows) == 6 * each
    assert len({row["images"][0] for row in rows}) == 6
    for row in rows:
        (chosen,), (rejected,) = row["chosen"], row["rejected"]
        assert rejected["content"] in KINDS[answer_type(chosen["content"])]
        assert rejected["content"] != chosen["content"]
        assert (tmp_path / row["images"][0]).is_file()


def process(code: str, log: Path) -> subprocess.Popen[str]:
    with log.open("w") as errors:
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", code]
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True)


def test_a_contender_takes_steps_in_turns_and_tells_its_errors(tmp_path: Path) -> None:
    code = """
import sys
for seconds in (9, 1, 3, 2):
    sys.stdin.readline()
    print("a note of a library")
    print('{"seconds": %d, "loss": 0.5}' % seconds, flush=True)
sys.stdin.readline()
sys.exit("no rows are left")
"""
    contender = Contender("trl", {}, process(code, tmp_path / "log"), tmp_path / "log")
    for _ in range(4):
        contender.step()
    # The first step does not count.
    assert contender.median() == 2
    assert contender.figures == [{"loss": 0.5}] * 4 and contender.memory_mb > 0
    with pytest.raises(SystemExit, match="exit code 1:\nno rows are left"):
        contender.step()
