"""The comparison of ways to share adapters: its recipes and its lines."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.multi_task import SHARING, TASKS, base_recipe, lines, task_recipe
from vlm_tune.evaluation.metrics import Answer


def answers(right: dict[str, int]) -> list[Answer]:
    """Ten answers of each task about ten images, the first ones right."""
    return [
        Answer(
            id=f"{task}{number}",
            image=f"{number}.png",
            question="q",
            expected="red",
            generated="red" if number < correct else "blue",
            correct=number < correct,
            category=task,
            source=task,
            images=(f"{number}.png",),
        )
        for task, correct in right.items()
        for number in range(10)
    ]


def test_all_runs_see_the_same_rows_with_the_same_rule(tmp_path: Path) -> None:
    options = argparse.Namespace(align=1, epochs=0.5, limit=64)
    base = base_recipe(options, tmp_path / "base")
    assert [name for name, _ in base.resolved_stages()] == ["align", "base"]
    together = [
        task_recipe(options, tmp_path, tmp_path / name, sharing, "")
        for name, sharing in SHARING.items()
    ]
    assert [recipe.tune[2].sharing for recipe in together] == ["hard", "soft", "layered"]
    assert len({recipe.data.model_dump_json() for recipe in together}) == 1
    assert len({(recipe.tune[2].r, recipe.train.model_dump_json()) for recipe in together}) == 1
    for task in TASKS:
        alone = task_recipe(options, tmp_path, tmp_path / task, SHARING["hard"], task)
        sources = together[0].data.train
        assert alone.data.train == [each for each in sources if each.task_name == task]
        assert alone.train == together[0].train


def test_a_line_compares_a_task_with_itself_alone() -> None:
    alone = answers({"color": 8, "shape": 5, "presence": 5})
    together = {"hard": answers({"color": 8, "shape": 10, "presence": 4})}
    color, shape, presence = lines(alone, together)
    assert color.startswith("color     hard     80.00%") and "difference +0.00%" in color
    assert "100.00%" in shape and "alone 50.00%" in shape and "difference +50.00%" in shape
    assert "difference -10.00%" in presence
