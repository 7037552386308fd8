"""The recipes of `benchmarks.transfer` are valid, without its runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.transfer import BASE_STEPS, WAYS, base_recipe, way_recipe


@pytest.mark.parametrize("way", WAYS)
def test_each_way_starts_from_the_base_and_tunes_by_its_own_rules(way: str, tmp_path: Path) -> None:
    recipe = way_recipe(tmp_path, way, 1e-3, tmp_path / "run", 1)
    assert [rule.how for rule in recipe.tune] == ["frozen", *(each["how"] for each in WAYS[way])]
    assert recipe.model.pretrained == str(tmp_path) and not recipe.stages


def test_the_base_is_trained_for_few_steps(tmp_path: Path) -> None:
    (_, align), (_, base) = base_recipe(tmp_path).resolved_stages()
    assert align.train.epochs == 7 and (base.train.epochs, base.train.steps) == (None, BASE_STEPS)
