"""Floors and caps of the dependencies are those of the releases that were tried."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / ".ci" / "requirements.py"))


def test_every_dependency_is_capped_after_the_newest_release_that_was_tried(
    script: dict[str, Any],
) -> None:
    assert script["problems"](script["load_project"]()) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "transformers>=5.17.0",
            "transformers>=5.16.0",
            "transformers: the floor is 5.16.0, the oldest tried is 5.17.0",
        ),
        ("datasets>=5.0.1,<6", "datasets>=5.0.1", "datasets: the cap is None, after 5.2.0 it is 6"),
    ],
)
def test_a_changed_floor_or_a_lifted_cap_is_named(
    script: dict[str, Any], old: str, new: str, problem: str
) -> None:
    project = copy.deepcopy(script["load_project"]())
    lines = project["project"]["dependencies"]
    place = next(number for number, line in enumerate(lines) if line.startswith(old))
    lines[place] = lines[place].replace(old, new)
    assert script["problems"](project) == [problem]


def test_newest_lifts_the_caps_and_oldest_pins_the_floors(script: dict[str, Any]) -> None:
    lines = script["requirements"](script["load_project"]())
    torch = next(each for each in lines if each.name == "torch")
    assert script["newest"](torch) == "torch>=2.11.0"
    assert script["oldest"](torch) == "torch==2.11.0"
    assert {"gguf", "av", "pytest"} <= {each.name for each in lines}
