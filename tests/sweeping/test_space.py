"""Search spaces: how they are written, and what a recipe does not take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.formula_runs import write_formula_recipe
from vlm_tune.config.load import load_recipe
from vlm_tune.errors import RecipeError
from vlm_tune.sweeping.space import Choices, Range, check_space, parse_search, space_differences

RATE = "train.learning_rate"


@pytest.mark.parametrize(
    ("written", "dimension"),
    [
        ("log:1e-5..1e-3", Range(1e-5, 1e-3, log=True)),
        ("log:1..64", Range(1, 64, log=True)),
        ("1..8", Range(1, 8)),
        ("1..8:3", Range(1, 7, step=3)),
        ("0.0..0.5", Range(0.0, 0.5)),
        ("0.1..0.45:0.1", Range(0.1, 0.4, step=0.1)),
        (" 1...5", Range(1.0, 5.0)),
        ("8,16,32", Choices((8, 16, 32))),
        ("cosine,linear", Choices(("cosine", "linear"))),
        ("true,null", Choices((True, None))),
        ('../a,"b,c"', Choices(("../a", "b,c"))),
        ([1e-4, 3e-4], Choices((1e-4, 3e-4))),
    ],
)
def test_what_is_written_is_read(written: Any, dimension: Range | Choices) -> None:
    read = parse_search({RATE: written})[RATE]
    assert read == dimension
    assert [type(end) for end in read.ends] == [type(end) for end in dimension.ends]
    assert parse_search({RATE: read.written})[RATE] == read


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("1e-5", "expected two values or more"),
        ("1e-5..x", "expected two values or more"),
        ("log:1e-5,1e-3", "expected two values or more"),
        ([], "expected two values or more"),
        (3, "expected two values or more"),
        ("1..1", "LOW under HIGH"),
        ("2..1", "LOW under HIGH"),
        ("log:0..1", "starts above 0"),
        ("log:1..8:2", "has no step"),
        ("1..8:9", "expected a step above 0 and up to 7"),
        ("0..1e999", "too large"),
        ("1,2,1", "comes twice"),
        ('"a', "not YAML"),
        ("[1,2],3", "plain values"),
        ([float("nan"), 1.0], "plain values"),
        ([10**400, 1], "finite numbers"),
    ],
)
def test_what_is_no_search_is_an_error(written: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        parse_search({RATE: written})
    assert error.value.problems[0].where.startswith(f"--search {RATE}")


@pytest.mark.parametrize("search", [{}, "a=1,2", [("a", "1,2")], None])
def test_a_search_is_a_mapping_with_keys(search: Any) -> None:
    with pytest.raises(RecipeError, match="expected recipe keys with values written as"):
        parse_search(search)


@pytest.mark.parametrize(
    "key", ["output", "evaluate.limit", "stages.1.evaluate.best", "data.validation.0.path"]
)
def test_what_makes_scores_comparable_is_not_searched(key: str) -> None:
    with pytest.raises(RecipeError, match="can't be searched"):
        parse_search({key: "a,b"})


def test_a_range_has_its_values_and_draws_them_all() -> None:
    space = parse_search({"a": "1..8:3", "b": "0.1..0.4:0.1", "c": "x,y", "d": "0.0..1.0"})
    assert [each.size for each in space.values()] == [3, 4, 2, float("inf")]
    generator = np.random.default_rng(0)
    drawn = {key: {space[key].draw(generator) for _ in range(60)} for key in "abc"}
    assert drawn == {"a": {1, 4, 7}, "b": {0.1, 0.2, 0.3, 0.4}, "c": {"x", "y"}}


def check(folder: Path, search: dict[str, Any]) -> None:
    check_space(load_recipe(write_formula_recipe(folder)), parse_search(search))


@pytest.mark.parametrize(
    ("key", "written", "message"),
    [
        ("train.learning_rat", "log:1e-5..1e-3", r"did you mean learning_rate\?"),
        (RATE, "log:1e-5..1e3", r"=1000.0: .* less than or equal to 100"),
        ("tune.7.r", "8,16", "tune is a list of 3; '7' is not one of its places: tune.0"),
        ("tune.0.r", "8,16", "r belongs to how: lora"),
        ("train.schedule.kind", "cosine,linaer", "did you mean linear"),
        ("train.batch_size", "0..8", "=0: .* greater than 0"),
    ],
)
def test_the_recipe_is_loaded_with_the_ends(
    tmp_path: Path, key: str, written: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        check(tmp_path, {key: written})
    assert error.value.problems[0].where.startswith(f"--search {key}=")
    assert len(error.value.problems) == 1


def test_ends_are_tried_with_those_of_other_keys(tmp_path: Path) -> None:
    check(tmp_path, {"train.epochs": "1,2", RATE: "log:1e-5..1e-3", "tune.1.r": "8,16"})
    # Each is right alone: `epochs` and `steps` replace each other.
    with pytest.raises(RecipeError, match="exactly one of"):
        check(tmp_path, {"train.epochs": "1,2", "train.steps": "8,16"})


def test_the_difference_of_two_spaces_is_told_by_key() -> None:
    old = parse_search({RATE: "log:1e-5..1e-3", "tune.1.r": "8,16", "seed": "1..3"})
    new = parse_search({RATE: "log:1e-5..1e-2", "tune.1.r": [8, 16], "seed": "1.0..3.0"})
    assert space_differences(old, old) == []
    assert space_differences(old, new) == [
        f'{RATE}: "log:1e-05..0.001" -> "log:1e-05..0.01"',
        'seed: "1..3" -> "1.0..3.0"',
    ]
    assert space_differences(old, {}) == [
        f'{RATE}: "log:1e-05..0.001" -> not searched',
        "tune.1.r: [8, 16] -> not searched",
        'seed: "1..3" -> not searched',
    ]
