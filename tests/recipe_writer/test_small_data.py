"""Few images whose names are asked: the tower is aligned with the answers first, and nothing that
training needs is held out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.own_data import color_images
from tests.helpers.row_samples import write_rows
from vlm_tune.recipe_writer.choose import (
    batches,
    held_out,
    set_data,
    set_evaluation,
    set_training,
    shape_tower,
)
from vlm_tune.recipe_writer.draft import Draft
from vlm_tune.recipe_writer.look import Facts, look
from vlm_tune.recipe_writer.machine import Machine
from vlm_tune.recipe_writer.models import candidates
from vlm_tune.recipe_writer.small_data import aligned_first

CPU = Machine("a CPU", None, 8_000_000_000, 2, hub=False)
NO_PARTS: dict[str, list[dict[str, Any]]] = {
    "train": [{"kind": "file", "path": "train.jsonl"}],
    "validation": [],
    "test": [],
}
WORDS = ("oak", "elm", "fir", "yew", "ash", "bay", "box", "fig")
LookAt = Callable[[Callable[[int], Iterator[tuple[str, str]]]], Facts]


@pytest.fixture
def look_at(tmp_path: Path) -> LookAt:
    """What 40 images are like, with the questions and answers that a function gives by number."""

    def facts(rows_about: Callable[[int], Iterator[tuple[str, str]]]) -> Facts:
        rows = []
        for number, (_, image) in enumerate(color_images(10)):
            image.save(tmp_path / f"{number}.png")
            rows += [
                {"image": f"{number}.png", "question": question, "answer": answer}
                for question, answer in rows_about(number)
            ]
        return look([{"kind": "file", "path": str(write_rows(tmp_path / "rows.jsonl", rows))}])

    return facts


def names(number: int) -> Iterator[tuple[str, str]]:
    """The name of one image only, and a group of several."""
    yield "What is it?", f"{WORDS[number % 8]} {WORDS[number // 8]}"
    yield "Which kind?", ("tree", "bush")[number % 2]


def test_names_of_one_image_each_are_no_part_to_hold_out(look_at: LookAt) -> None:
    facts = look_at(names)
    assert facts.unrepeated == 0.5 and facts.single_images
    split, reason = held_out(facts, NO_PARTS)
    assert split == {"test": 0.1}
    assert "no validation part is held out: 50% of the questions" in reason
    files = {**NO_PARTS, "test": [{"kind": "file", "path": "test.jsonl"}]}
    split, reason = held_out(facts, files)
    assert split is None and reason.startswith("no validation part")
    assert held_out(replace(facts, unrepeated=0.1), files)[0] == {"validation": 0.1}
    assert held_out(replace(facts, rows=30 * facts.rows), files)[0] == {"validation": 0.1}


def test_what_is_asked_decides_what_may_change_in_an_image(look_at: LookAt) -> None:
    assert not look_at(lambda number: iter([(f"Is it number {number}?", "tree")])).whole_image
    assert not look_at(lambda number: iter([("A tree?", ("yes", "no")[number % 2])])).whole_image
    assert not look_at(lambda number: iter([("How many?", str(number % 4))])).whole_image
    assert not look_at(lambda number: iter([("Where?", "at the left")])).whole_image
    assert not look_at(lambda number: iter([("Where?", f"[1, 2, 3, {number}]")])).whole_image
    shades = look_at(lambda number: iter([("Which?", ("light blue", "red")[number % 2])]))
    assert shades.colours and shades.whole_image and shades.unrepeated == 0
    fruit = look_at(lambda number: iter([("Which?", "red plum" if not number else "pear")]))
    assert not fruit.colours


def local_draft(facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Draft:
    """The draft for data on a machine with the models of `make models`."""
    monkeypatch.chdir(tmp_path)
    Path("models/smollm2-135m-instruct").mkdir(parents=True, exist_ok=True)
    Path("models/efficientnet_lite0.safetensors").touch()
    (choice,) = (aligned_first(each, facts) for each in candidates(CPU, facts, None, None))
    draft = choice.draft.copy()
    draft.set("name", "x")
    draft.set("output", "runs/x")
    shape_tower(draft, facts, choice.size)
    set_data(draft, facts, NO_PARTS, choice)
    set_training(draft, facts, CPU, choice, batches(facts, choice)[0])
    set_evaluation(draft, facts, choice)
    return draft


def test_few_named_images_are_aligned_first(
    look_at: LookAt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = look_at(names)
    recipe = local_draft(facts, tmp_path, monkeypatch).recipe("recipe")
    align, instruct = recipe.stages
    assert align.objective is not None and align.objective.kind == "contrastive"
    assert [rule.how for rule in recipe.tune] == ["frozen", "frozen", "lora"]
    assert instruct.objective is not None and instruct.objective.kind == "language_modeling"
    assert instruct.objective.image_noise > 0
    assert recipe.data.augment is not None and recipe.data.augment.hue > 0
    assert recipe.model.connector.kind == "avg_pool"
    shades = local_draft(replace(facts, colours=True), tmp_path, monkeypatch).recipe("recipe")
    assert shades.data.augment is not None
    assert (shades.data.augment.colour, shades.data.augment.hue) == (0, 0)
    for other in (
        replace(facts, whole_image=False),
        replace(facts, single_images=False),
        replace(facts, rows=30 * facts.rows),
        replace(facts, answers="long"),
    ):
        plain = local_draft(other, tmp_path, monkeypatch).recipe("recipe")
        assert not plain.stages and plain.data.augment is None
