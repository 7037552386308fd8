"""Local copies of public benchmarks are read in their layouts and scored by their own rules.

Expected scores follow by hand from the rules of the benchmarks' own scripts: LLaVA's eval_pope,
m4c_evaluator and eval_science_qa; ScienceQA's evaluate_acc; VLMEvalKit's multiple_choice;
pix2struct's relaxed_correctness.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers import benchmark_copies
from tests.helpers.tiny_models import parsed
from vlm_tune.api import evaluate, sft
from vlm_tune.cli.entry import main
from vlm_tune.data.types import Conversation
from vlm_tune.errors import DataError, RecipeError
from vlm_tune.evaluation.assessment import assess
from vlm_tune.evaluation.benchmarks import BENCHMARKS, mmbench, pope, read_benchmarks, scienceqa
from vlm_tune.evaluation.benchmarks.textvqa import normalise
from vlm_tune.evaluation.evaluate import row_answers
from vlm_tune.evaluation.metrics import Scores, scores


def copy_of(name: str, folder: Path) -> str:
    return f"{name}={benchmark_copies.COPIES[name](folder / name)}"


def assessed(rows: Sequence[Conversation], texts: Sequence[str]) -> Scores:
    scored = scores(row_answers(rows, texts), {})
    assess(scored)
    return scored


def values(metrics: dict[str, dict[str, Any]]) -> dict[str, float]:
    return {name: entry["value"] for name, entry in metrics.items()}


def test_pope_counts_yes_by_split(tmp_path: Path) -> None:
    rows = read_benchmarks([copy_of("pope", tmp_path)])
    assert [row.source_name for row in rows] == ["adversarial"] * 4 + ["random"] * 4
    assert (
        rows[0].question
        == "Is there a thing 1 in the image?\nAnswer the question using a single word or phrase."
    )
    texts = ["Yes", "No.", "yes, there is not", "yes", "Yes. No", "maybe", "No, none", "not sure"]
    scored = assessed(rows, texts)
    assert values(scored.by_source["random"]["metrics"]) == pytest.approx(
        {
            "pope_accuracy": 0.75,
            "pope_precision": 1.0,
            "pope_recall": 2 / 3,
            "pope_f1": 0.8,
            "pope_yes_ratio": 0.5,
        }
    )
    assert values(scored.by_source["adversarial"]["metrics"]) == pytest.approx(
        {
            "pope_accuracy": 0.5,
            "pope_precision": 0.5,
            "pope_recall": 0.5,
            "pope_f1": 0.5,
            "pope_yes_ratio": 0.5,
        }
    )
    assert scored.metrics["pope_accuracy"]["value"] == 0.625
    never = values(assessed(rows, ["no"] * 8).metrics)
    assert (never["pope_precision"], never["pope_recall"], never["pope_f1"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("No", False),
        ("no", False),
        ("NO", True),
        ("There is no dog.", False),
        ("Yes. There is no dog", True),
        ("no,", False),
        ("\nno", True),
        ("", True),
    ],
)
def test_popes_rule_for_yes(text: str, yes: bool) -> None:
    assert pope.says_yes(text) == yes


@pytest.mark.parametrize("copies", [False, True])
def test_mmbench_is_right_where_every_rotation_is(copies: bool, tmp_path: Path) -> None:
    path = benchmark_copies.mmbench(tmp_path / "MMBench_DEV_EN.tsv", copies=copies)
    rows = read_benchmarks([f"mmbench={path}"])
    assert [(row.id, row.messages[-1].text) for row in rows] == [
        ("7:0", "B"),
        ("7:1", "A"),
        ("7:2", "C"),
        ("9:0", "A"),
        ("9:1", "B"),
    ]
    assert rows[1].references.choices == ("green", "blue", "red")
    assert rows[3].question == (
        "Look.\nIs it red?\nA. yes\nB. no\n"
        "Answer with the option's letter from the given choices directly."
    )
    image = Image.open(io.BytesIO(rows[2].media[0].read()))
    assert image.convert("RGB").getpixel((5, 5)) == benchmark_copies.COLORS["green"]
    # The third pass of the first question has the choices blue, red, green.
    last = assessed(rows, ["B", "(A)", "red", "yes", "B"])
    assert values(last.metrics) == {"mmbench_circular": 0.5, "mmbench_vanilla": 1.0}
    right = ["B", "green", "C", "A", "B."]
    assert values(assessed(rows, right).metrics) == {"mmbench_circular": 1.0, "mmbench_vanilla": 1}
    second = assessed(rows, ["A", "A", "C", "A", "B"])
    assert values(second.metrics) == {"mmbench_circular": 0.5, "mmbench_vanilla": 0.5}
    assert values(second.by_source["attribute"]["metrics"])["mmbench_circular"] == 0
    assert values(second.by_category["exists"]["metrics"])["mmbench_circular"] == 1


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("B", 1),
        ("(B)", 1),
        ("B: dog", 1),
        ("The answer is B.", 1),
        ("A or B", None),
        ("A dog is in", 1),
        ("a dog", 1),
        ("It is a cat", 0),
        ("cat and dog", None),
        ("neither", None),
        ("", None),
        ("b", None),
        ("dog " * 30, None),
    ],
)
def test_mmbenchs_rule_for_a_choice(text: str, place: int | None) -> None:
    assert mmbench.chosen_place(text, ("cat", "dog")) == place


@pytest.mark.parametrize("layout", ["scienceqa", "scienceqa_parquet"])
def test_scienceqa_is_scored_by_group(layout: str, tmp_path: Path) -> None:
    folder = getattr(benchmark_copies, layout)(tmp_path / "copy")
    rows = read_benchmarks([f"scienceqa={folder}"])
    assert [row.category for row in rows] == ["NAT TXT IMG G1-6", "LAN NO G7-12", "SOC IMG G7-12"]
    assert [len(row.media) for row in rows] == [1, 0, 1]
    assert rows[0].question == (
        "Context: Think of a stove.\nWhich is hot?\nA. ice\nB. fire\n"
        "Answer with the option's letter from the given choices directly."
    )
    scored = assessed(rows, ["B. fire", "The answer is B.", "A"])
    assert values(scored.metrics) == pytest.approx(
        {
            "scienceqa_accuracy": 2 / 3,
            "scienceqa_nat": 1.0,
            "scienceqa_soc": 1.0,
            "scienceqa_lan": 0.0,
            "scienceqa_txt": 1.0,
            "scienceqa_img": 1.0,
            "scienceqa_no": 0.0,
            "scienceqa_g1_6": 1.0,
            "scienceqa_g7_12": 0.5,
        }
    )


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("B", 1),
        (" B ", 1),
        ("B. fire", 1),
        ("B.", None),
        ("B. ", 1),
        ("\nB", None),
        ("The answer is A or the other. The answer is B.", 1),
        ("B\nbecause", 1),
        ("The answer is B.", 1),
        ("So. The answer is B because", 1),
        ("the answer is B", None),
        ("(B)", None),
        ("C", None),
        ("fire", None),
        ("", None),
    ],
)
def test_scienceqas_rule_for_a_letter(text: str, place: int | None) -> None:
    assert scienceqa.chosen_place(text, 2) == place


def test_textvqa_is_soft_accuracy_over_ten_answers(tmp_path: Path) -> None:
    rows = read_benchmarks([copy_of("textvqa", tmp_path)])
    assert [row.messages[-1].text for row in rows] == ["stop", "twelve"]
    for texts, expected in (
        (["stop", "12"], [1.0, 0.6]),
        (["Stop sign.", "twelve"], [0.9, 1.0]),
        (["the stop?", "13"], [1.0, 0.0]),
    ):
        scored = assessed(rows, texts)
        assert values(scored.metrics)["textvqa_accuracy"] == pytest.approx(sum(expected) / 2)


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("It's a Dog's bowl?", "it 's dog 's bowl"),
        ("1,000", "1000"),
        ("dont stop!", "don't stop"),
        ("two-one", "2 1"),
        ("3.5 m.", "3.5 m"),
        ("a/b", "b"),
    ],
)
def test_textvqas_normalisation(text: str, normalised: str) -> None:
    assert normalise(text) == normalised


def test_chartqa_averages_its_halves(tmp_path: Path) -> None:
    rows = read_benchmarks([copy_of("chartqa", tmp_path)])
    assert [row.source_name for row in rows] == ["human", "human", "augmented"]
    scored = assessed(rows, ["104.9", "no", "25%"])
    assert values(scored.metrics) == pytest.approx(
        {"chartqa_average": 0.75, "chartqa_pooled": 2 / 3}
    )
    assert values(scored.by_source["human"]["metrics"])["chartqa_average"] == 0.5
    assert values(assessed(rows, ["105.1", "YES", "0.3"]).metrics) == pytest.approx(
        {"chartqa_average": 0.25, "chartqa_pooled": 1 / 3}
    )
    ends = scored.metrics["chartqa_average"]
    assert ends["low"] < 0.75 < ends["high"]


def test_a_run_is_scored_on_all_of_them(
    tiny_recipe: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {"train__steps": 1, "data__validation": [], "data__max_length": 256}
    recipe = parsed(tiny_recipe("causal"), **changes, evaluate__samples=0)
    run = sft(recipe)
    copies = [copy_of(name, tmp_path) for name in BENCHMARKS]
    scored = evaluate(run.folder, benchmark=copies, answering="likelihood", baselines=["blind"])
    assert set(scored.metrics) == {
        metric.name for each in BENCHMARKS.values() for metric in each.metrics
    }
    assert set(scored.baselines["blind"]) == set(scored.metrics)
    assert {each.generated for each in scored.answers if each.references.form == "pope"} <= {
        "yes",
        "no",
    }
    arguments = ["eval", str(run.folder), "--benchmark", copies[0], "--baselines", "none"]
    monkeypatch.setattr("sys.argv", ["vlm-tune", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "POPE F1 of yes" in capsys.readouterr().out


def break_pope(folder: Path) -> str:
    (folder / "coco_pope_random.json").write_text('{"image": "x.jpg"}\n')
    return "expected an object with `label`"


def lose_image(folder: Path) -> str:
    (folder / "val2014" / "COCO_val2014_red.jpg").unlink()
    return "the image 'COCO_val2014_red.jpg' is in none of val2014, images, coco/val2014, ."


def leave_folder(folder: Path) -> str:
    line = '{"image": "../x.jpg", "text": "q", "label": "yes"}\n'
    (folder / "coco_pope_random.json").write_text(line)
    return "the image '../x.jpg' lies outside of the copy"


def other_label(folder: Path) -> str:
    (folder / "coco_pope_random.json").write_text('{"text": "q", "label": "maybe"}\n')
    return "`label` must be yes or no, got 'maybe'"


@pytest.mark.parametrize("damage", [break_pope, lose_image, leave_folder, other_label])
def test_damaged_copies_are_data_errors(damage: Callable[[Path], str], tmp_path: Path) -> None:
    folder = benchmark_copies.pope(tmp_path / "pope")
    message = damage(folder)
    with pytest.raises(DataError) as error:
        read_benchmarks([f"pope={folder}"])
    assert message in str(error.value)


ODD: tuple[Any, ...] = (7, -1.5, True, "x", "a\0b", "n" * 300, [], [None], {}, {"a": 1}, None)
"""Values that stand in place of a field's."""


def changed(value: Any) -> Iterator[Any]:
    """JSON values with one part, however deep, replaced by an odd one."""
    yield from ODD
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            for other in changed(value[key]):
                copied = value.copy()
                copied[key] = other
                yield copied


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("pope", "coco_pope_random.json"),
        ("textvqa", "TextVQA_0.5.1_val.json"),
        ("scienceqa", "problems.json"),
        ("scienceqa", "pid_splits.json"),
        ("chartqa", "test/test_human.json"),
    ],
)
def test_odd_values_are_data_errors_or_text(name: str, file: str, tmp_path: Path) -> None:
    copy = copy_of(name, tmp_path)
    path = tmp_path / name / file
    original = path.read_text(encoding="utf-8")
    lines = original.splitlines() if name == "pope" else [original]
    refused = 0
    for value in changed(json.loads(lines[0])):
        path.write_text("\n".join([json.dumps(value), *lines[1:]]), encoding="utf-8")
        try:
            read_benchmarks([copy])
        except DataError:
            refused += 1
    assert refused > 20
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match="can't be read"):
        read_benchmarks([copy])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_copy_that_is_not_there_or_empty_is_a_data_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such f|can't be read as TSV"):
        read_benchmarks([f"{name}={tmp_path / 'nothing'}"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has n|can't be read as TSV"):
        read_benchmarks([f"{name}={tmp_path / 'empty'}"])


@pytest.mark.parametrize("copy", ["pope", "=x", "popes=x", "pope=", ""])
def test_a_copy_is_written_as_name_and_path(copy: str) -> None:
    with pytest.raises(RecipeError, match="expected NAME=PATH with a name of pope, mmbench"):
        read_benchmarks([copy])


def test_every_row_of_a_copy_has_an_own_key(tmp_path: Path) -> None:
    rows = read_benchmarks([copy_of(name, tmp_path) for name in BENCHMARKS])
    keys = [(row.references.form, row.source_name, row.id) for row in rows]
    assert len(set(keys)) == len(keys)
    assert all(replace(row, id="").messages for row in rows)
