"""Floors and caps of the dependencies are those of the releases that were tried."""

from __future__ import annotations

import copy
import re
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


def test_the_docs_table_is_that_of_the_releases_that_were_tried(script: dict[str, Any]) -> None:
    tried = script["load_project"]()["tool"]["vlm_tune"]["tried"]
    lines = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8").splitlines()
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]
    assert {name: [first, last] for name, first, last in table} == tried


def test_the_images_torch_is_within_the_range(script: dict[str, Any]) -> None:
    (tag,) = re.findall(
        r"^ARG BASE=pytorch/pytorch:([\d.]+)-cuda[\d.]+-cudnn9-devel$",
        (ROOT / "Dockerfile").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    (torch,) = (
        each for each in script["requirements"](script["load_project"]()) if each.name == "torch"
    )
    assert torch.specifier.contains(tag)


def test_newest_lifts_the_caps_and_oldest_pins_the_floors(script: dict[str, Any]) -> None:
    lines = script["requirements"](script["load_project"]())
    torch = next(each for each in lines if each.name == "torch")
    assert script["newest"](torch) == "torch>=2.11.0"
    assert script["oldest"](torch) == "torch==2.11.0"
    assert {"gguf", "av", "pytest"} <= {each.name for each in lines}
