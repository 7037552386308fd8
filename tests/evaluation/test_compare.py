"""Two runs are compared on the same rows, or refused with what differs."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import vlm_tune
from tests.helpers.tiny_models import cli
from vlm_tune.data.types import References
from vlm_tune.errors import DataError, ModelError, RecipeError
from vlm_tune.evaluation.answer_files import answer_from, read_answers, save_answers
from vlm_tune.evaluation.compare import compare
from vlm_tune.evaluation.metrics import Answer


def answers(right: set[int], count: int = 12) -> list[Answer]:
    return [
        Answer(
            f"row {number}",
            f"{number // 2}.png",
            "is it?",
            "yes",
            "yes" if number in right else "no",
            number in right,
            "",
            "test",
            (f"{number // 2}.png",),
            References("multiple_choice", choices=("yes", "no"), chosen=0),
        )
        for number in range(count)
    ]


def write_run(folder: Path, rows: list[Answer], rate: float) -> Path:
    folder.mkdir()
    save_answers(folder / "answers.jsonl", rows)
    recipe = (Path(__file__).parents[2] / "recipes" / "demo.yaml").read_text()
    from vlm_tune.config.load import dump_recipe, parse_recipe
    from vlm_tune.config.recipe import Recipe

    parsed = parse_recipe(recipe)
    train = parsed.train.model_copy(update={"learning_rate": rate})
    changed: Recipe = parsed.model_copy(update={"name": folder.name, "train": train})
    (folder / "recipe.yaml").write_text(dump_recipe(changed))
    return folder


def test_answers_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = answers({1, 2})
    assert read_answers(write_run(tmp_path / "run", rows, 1e-3)) == rows
    # A run of an earlier release has neither images nor references.
    earlier = {
        key: value
        for key, value in asdict(rows[0]).items()
        if key not in ("images", "references", "loss", "tokens")
    }
    assert answer_from(earlier) == replace(rows[0], references=References())


def test_answers_may_hold_line_breaks_of_other_kinds_and_losses_that_are_not_finite(
    tmp_path: Path,
) -> None:
    (row,) = answers({0}, 1)
    odd = replace(row, generated="a\u2028b\x85c", loss=math.nan, tokens=2)
    save_answers(tmp_path / "answers.jsonl", [odd])
    assert "NaN" not in (tmp_path / "answers.jsonl").read_text()
    (read,) = read_answers(tmp_path)
    assert read.generated == odd.generated and math.isnan(read.loss)


def test_a_comparison_is_of_the_second_less_the_first(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", answers({0, 1, 2}), 1e-3)
    second = write_run(tmp_path / "b", answers({2, *range(4, 12)})[::-1], 2e-3)
    comparison = vlm_tune.compare(first, second)
    assert comparison.n == 12
    entry = comparison.metrics["exact_match"]
    assert entry["first"]["value"] == 3 / 12 and entry["second"]["value"] == 9 / 12
    assert entry["difference"] == 0.5 and entry["images"] == 6
    assert entry["difference_low"] < 0.5 < entry["difference_high"]
    assert "choice_text" in comparison.metrics
    assert [flip.id for flip in comparison.fixed] == [f"row {number}" for number in range(4, 12)]
    assert [flip.id for flip in comparison.broken] == ["row 0", "row 1"]
    assert (comparison.fixed[0].first, comparison.fixed[0].second) == ("no", "yes")
    assert comparison.recipe == ["train.learning_rate: 0.001 -> 0.002"]
    assert json.loads(json.dumps(comparison.summary()))["n"] == 12


def test_a_comparison_is_printed(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", answers({0}), 1e-3)
    second = write_run(tmp_path / "b", answers({0, 1, 2, 3}), 1e-3)
    printed = cli("compare", str(first), str(second), "--flips", "2")
    assert "right in B alone: 3 of 12 rows" in printed and "and 1 more" in printed
    assert "row 1: is it? (expected yes) A: no B: yes" in printed
    assert "differences of the recipes, A -> B:\n  none" in printed
    assert "+25.00%" in printed
    as_json = json.loads(cli("compare", str(first), str(second), "--json"))
    assert as_json["metrics"]["exact_match"]["difference"] == 0.25


def test_other_rows_are_refused_with_what_differs() -> None:
    rows = answers({1})
    changed = [replace(rows[0], expected="no"), *rows[1:11], replace(rows[11], id="another")]
    with pytest.raises(DataError) as caught:
        compare(rows, changed, names=("a", "b"))
    assert str(caught.value) == (
        "the rows differ: 1 only in a (row 11); 1 only in b (another); 1 with another question or "
        "reference (row 0); compare both on one file with --data"
    )


def test_other_references_are_refused() -> None:
    rows = answers({1})
    changed = [replace(rows[0], references=References("multiple_choice")), *rows[1:]]
    with pytest.raises(DataError, match="1 with another question or reference"):
        compare(rows, changed, names=("a", "b"))
    earlier = [replace(rows[0], references=References()), *rows[1:]]
    assert compare(rows, earlier, names=("a", "b")).n == 12


def test_a_limit_counts_rows_of_the_first_wherever_the_second_has_them(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", answers({0, 1}), 1e-3)
    second = write_run(tmp_path / "b", answers({0})[::-1], 1e-3)
    comparison = vlm_tune.compare(first, second, limit=3)
    assert comparison.n == 3 and [flip.id for flip in comparison.broken] == ["row 1"]


def test_what_is_not_compared_is_named(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", answers({0}), 1e-3)
    rows = [replace(row, loss=1.0, tokens=2) for row in answers({0})]
    second = write_run(tmp_path / "b", rows, 1e-3)
    (second / "recipe.yaml").write_text("no recipe")
    comparison = vlm_tune.compare(first, second, metrics=["exact_match", "perplexity", "box_iou"])
    assert comparison.skipped == {
        "box_iou": "no row has a box in the reference answer",
        "perplexity": f"{first}: not every row has the loss of its reference answer",
    }
    assert comparison.recipe is None
    printed = cli("compare", str(first), str(second), "--metrics", "perplexity")
    assert "perplexity is not computed: " in printed
    assert "not known: a recipe is missing or can't be read" in printed


def test_rows_of_one_id_are_paired_in_order() -> None:
    rows = [replace(row, id="same") for row in answers({0}, 2)]
    assert len(compare(rows, rows, names=("a", "b")).fixed) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"has no answers\.jsonl, which a run writes .* give --data"),
        ("", "holds no answers"),
        ("{}\n", "row 1: is no scored answer"),
        ("[]\n", "row 1: is no scored answer"),
        ("nothing\n", "row 1: is no scored answer"),
        ('{"image": "", "references": {"x": 1}}', "row 1: is no scored answer"),
    ],
)
def test_answers_that_can_not_be_read_are_named(
    content: str | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "answers.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        vlm_tune.compare(tmp_path, tmp_path)


def test_arguments_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        vlm_tune.compare(tmp_path / "nowhere", tmp_path)
    with pytest.raises(RecipeError, match="RUN_A"):
        vlm_tune.compare(5, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="--metrics"):
        vlm_tune.compare(tmp_path, tmp_path, metrics="exact_match")
    with pytest.raises(RecipeError, match="is no metric"):
        vlm_tune.compare(tmp_path, tmp_path, metrics=["exact"])


def test_a_damaged_answer_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text("\n\nno answer\n")
    with pytest.raises(DataError, match=r"answers\.jsonl, row 3: is no scored answer"):
        read_answers(tmp_path)
