"""Few images whose names are asked: nothing that training needs is held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.own_data import color_images
from tests.helpers.row_samples import write_rows
from vlm_tune.recipe_writer.choose import held_out
from vlm_tune.recipe_writer.look import Facts, look

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
