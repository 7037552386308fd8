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
    table,
    way_recipe,
)
from vlm_tune.config.load import check_command
from vlm_tune.data.sources.easy_vqa import KINDS, questions
from vlm_tune.evaluation.answer_files import ANSWERS_FILE, save_answers
from vlm_tune.evaluation.metrics import Answer


@pytest.mark.parametrize("way", WAYS)
def test_each_way_trains_the_same_weights_of_the_base(way: str, tmp_path: Path) -> None:
    base = base_recipe(1, tmp_path / "base-1")
    assert [name for name, _ in base.resolved_stages()] == ["align", "base"]
    recipe = way_recipe(way, base, RATES[0], tmp_path / way, 60)
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


def test_the_table_has_each_way_beside_the_base_and_beside_instruction_tuning(
    tmp_path: Path,
) -> None:
    def run(name: str, right: int) -> Path:
        (tmp_path / name).mkdir()
        answers = [
            Answer(
                f"{row}", f"{row}", "?", "red", "red" if row < right else "blue", row < right, ""
            )
            for row in range(8)
        ]
        save_answers(tmp_path / name / ANSWERS_FILE, answers)
        return tmp_path / name

    ways = {"sft": run("sft-0-60-0.001", 6), "dpo": run("dpo-0-60-0.002", 8)}
    rows = [row.split(" | ")[:5] for row in table(run("base-0", 4), ways)]
    assert [(*row[:4], row[4].partition(" ")[0]) for row in rows] == [
        ("| base-0", "sft-0-60-0.001", "50.00%", "75.00%", "+25.00%"),
        ("| base-0", "dpo-0-60-0.002", "50.00%", "100.00%", "+50.00%"),
        ("| sft-0-60-0.001", "dpo-0-60-0.002", "75.00%", "100.00%", "+25.00%"),
    ]
