"""The data and the figures of `benchmarks.two_styles`, without its packages and runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.two_styles import compared, flags, icons


def test_flags_with_a_disc_and_a_continent_are_taken(tmp_path: Path) -> None:
    trained, other = tmp_path / "flag-icons", tmp_path / "circle-flags"
    (other / "flags").mkdir(parents=True)
    trained.mkdir()
    countries = []
    for code, continent, iso in (("aa", "Asia", True), ("bb", "Asia", True), ("cc", None, True)):
        file = f"{code}.svg"
        (trained / file).write_text(f"<svg>{code}</svg>")
        countries.append(
            {"code": code, "name": code.upper(), "continent": continent, "iso": iso}
            | {"flag_4x3": file}
        )
        if code != "bb":
            (other / "flags" / file).write_text(f"<svg>disc {code}</svg>")
    (trained / "country.json").write_text(json.dumps(countries))
    (flag,) = flags(trained, other)
    assert (flag.key, flag.name, flag.group) == ("aa", "AA", "Asia")
    assert (flag.trained, flag.other) == ("<svg>aa</svg>", "<svg>disc aa</svg>")


def test_icons_of_both_styles_are_taken_once_and_without_variants(tmp_path: Path) -> None:
    names = {"bee": "one", "bee-two": "two", "cat": "three", "dog": "four"}
    for style, left_out in (("trained", ""), ("other", "dog")):
        (tmp_path / style).mkdir()
        drawings = {name: {"body": f"<{style}/>"} for name in names if name != left_out}
        (tmp_path / style / "icons.json").write_text(
            json.dumps({"icons": drawings, "width": 48, "height": 48})
        )
    groups = {group: [] for group in ("Sports", "Clothes", "Travel", "Health", "Music", "Makeups")}
    groups |= {group: [] for group in ("Baby", "Hardware", "Weather", "Build")}
    categories = {**groups, "Animals": list(names), "Foods": ["cat"]}
    (tmp_path / "trained" / "metadata.json").write_text(json.dumps({"categories": categories}))
    things = list(icons(tmp_path / "trained", tmp_path / "other"))
    assert [(thing.name, thing.group) for thing in things] == [
        ("bee", "Animals"),
        ("cat", "Animals"),
    ]
    assert 'viewBox="0 0 48 48"' in things[0].trained and "<trained/>" in things[0].trained
    assert "<other/>" in things[0].other


def test_seeds_are_compared_with_a_baseline_thing_by_thing() -> None:
    baseline = np.array([1.0, 0.0] * 100)
    ours = [np.array([1.0, 1.0, 1.0, 0.0] * 50), np.ones(200)]
    entry = compared(ours, baseline)
    assert entry["accuracy"] == 0.5
    assert abs(entry["difference"] - 0.375) < 1e-9
    assert entry["low"] > 0.2 and entry["p"] < 0.01
    same = compared([baseline, baseline], baseline)
    assert same["difference"] == 0 and same["p"] == 1
