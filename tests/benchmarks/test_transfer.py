"""The recipes of `benchmarks.transfer` are valid, without its runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.transfer import WAYS, base_recipe, way_recipe


@pytest.mark.parametrize("way", WAYS)
def test_each_way_starts_from_the_base_and_tunes_by_its_own_rules(way: str, tmp_path: Path) -> None:
    recipe = way_recipe(tmp_path, way, 1e-3, tmp_path / "run", 1)
    assert [rule.how for rule in recipe.tune] == ["frozen", *(each["how"] for each in WAYS[way])]
    assert recipe.model.pretrained == str(tmp_path) and not recipe.stages


def test_the_base_learns_other_questions(tmp_path: Path) -> None:
    base = base_recipe(tmp_path)
    assert [stage.name for stage in base.stages] == ["align", "base"]
    assert base.data.train[0].categories == ["yes/no"]
