"""The recipes and rows of `benchmarks.preference_gains`, without its runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.preference_gains import (
    RATES,
    WAYS,
    base_recipe,
    command,
    hasty_rows,
    run_name,
    way_recipe,
)
from vlm_tune.config.load import check_command
from vlm_tune.data.sources.easy_vqa import KINDS, questions


@pytest.mark.parametrize("way", WAYS)
def test_each_way_trains_the_same_weights_of_the_base(way: str, tmp_path: Path) -> None:
    base = base_recipe(1, tmp_path / "base-1")
    assert [name for name, _ in base.resolved_stages()] == ["align", "base"]
    recipe = way_recipe(way, base, RATES[0], tmp_path / run_name(way, base, RATES[0], 60), 60)
    check_command(recipe, command(way))
    (_, stage), *others = recipe.resolved_stages()
    assert not others and stage.seed == 1
    assert stage.model.pretrained == str(tmp_path / "base-1" / "model")
    assert [(rule.match, rule.how) for rule in stage.tune] == [("tower.*", "frozen"), ("*", "full")]
    assert stage.data.test == base.data.test
    if way != "grpo":
        assert (stage.train.steps, stage.train.batch_size) == (60, 128)


def test_hasty_answers_are_wrong_in_the_share_and_of_the_right_kind() -> None:
    rows = list(hasty_rows(0.4))
    right = questions("train", 200)
    assert [row["question"] for row in rows] == [question for _, question, _, _ in right]
    pairs = [(row["answer"], answer) for row, (_, _, answer, _) in zip(rows, right, strict=True)]
    kinds = {answer: kind for kind, answers in KINDS.items() for answer in answers}
    assert all(kinds[written] == kinds[answer] for written, answer in pairs)
    wrong = sum(written != answer for written, answer in pairs) / len(pairs)
    assert abs(wrong - 0.4) < 0.01
