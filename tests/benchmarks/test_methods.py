"""The recipes of `benchmarks.methods` are valid and build, without its runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.methods import CONNECTORS, method_recipe
from vlm_tune.model.build import bare_model


@pytest.mark.parametrize("name", CONNECTORS)
def test_each_connector_fits_tower_and_language_model(name: str, tmp_path: Path) -> None:
    recipe = method_recipe(CONNECTORS[name], tmp_path, 1)
    model, (tokens, _) = bare_model(recipe)
    assert tokens == 16 and sum(each.numel() for each in model.connector.parameters()) > 1000
    assert [rule.how for rule in recipe.tune] == ["frozen", "full"] and not recipe.stages
