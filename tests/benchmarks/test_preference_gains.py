"""The recipes and rows of `benchmarks.preference_gains`, without its runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import preference_gains
from benchmarks.preference_gains import (
    RATES,
    WAYS,
    base_recipe,
    best_run,
    command,
    hasty_rows,
    table,
    way_recipe,
)
from vlm_tune.config.load import check_command
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.sources.easy_vqa import KINDS, questions
from vlm_tune.evaluation.answer_files import ANSWERS_FILE, read_answers, save_answers
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
    assert not stage.data.test
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


def answers_with(right: int) -> list[Answer]:
    return [
        Answer(f"{row}", f"{row}", "?", "red", "red" if row < right else "blue", row < right, "")
        for row in range(8)
    ]


def saved_run(folder: Path, right: int) -> Path:
    folder.mkdir()
    save_answers(folder / ANSWERS_FILE, answers_with(right))
    return folder


def shown(rows: list[str]) -> list[tuple[str, ...]]:
    cells = [row.split(" | ")[:5] for row in rows]
    return [(*row[:4], row[4].partition(" ")[0]) for row in cells]


def test_the_table_has_each_way_beside_the_base_and_beside_instruction_tuning(
    tmp_path: Path,
) -> None:
    ways = {
        "sft": [saved_run(tmp_path / "sft-0-60-0.001", 6)],
        "dpo": [saved_run(tmp_path / "dpo-0-60-0.002", 8)],
    }
    assert shown(table([saved_run(tmp_path / "base-0", 4)], ways)) == [
        ("| base-0", "sft-0-60-0.001", "50.00%", "75.00%", "+25.00%"),
        ("| base-0", "dpo-0-60-0.002", "50.00%", "100.00%", "+50.00%"),
        ("| sft-0-60-0.001", "dpo-0-60-0.002", "75.00%", "100.00%", "+25.00%"),
    ]


def test_runs_of_several_seeds_are_compared_together(tmp_path: Path) -> None:
    bases = [saved_run(tmp_path / "base-0", 4), saved_run(tmp_path / "base-1", 2)]
    sft = [saved_run(tmp_path / "sft-0", 6), saved_run(tmp_path / "sft-1", 8)]
    assert shown(table(bases, {"sft": sft})) == [
        ("| base-0, base-1", "sft-0, sft-1", "37.50%", "87.50%", "+50.00%")
    ]


def test_only_the_rate_that_validation_chooses_answers_the_test_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(recipe: Recipe, command: str) -> Path:
        assert command == "dpo"
        Path(recipe.output).mkdir()
        return Path(recipe.output)

    def evaluated(run: Path, recipe: Recipe, split: str = "test") -> SimpleNamespace:
        answers = answers_with(8 if run.name.endswith(f"{RATES[1]:g}") else 4)
        scored.append((run.name, split))
        return SimpleNamespace(accuracy=sum(each.correct for each in answers) / 8, answers=answers)

    scored: list[tuple[str, str]] = []
    monkeypatch.setattr(preference_gains, "finished_run", trained)
    monkeypatch.setattr(preference_gains, "evaluate", evaluated)
    run = best_run("dpo", base_recipe(3, tmp_path / "base-3"), tmp_path, 120)
    assert run.name == f"dpo-3-120-{RATES[1]:g}"
    assert scored == [
        *((f"dpo-3-120-{rate:g}", "validation") for rate in RATES),
        (run.name, "test"),
    ]
    assert read_answers(run) == answers_with(8)
