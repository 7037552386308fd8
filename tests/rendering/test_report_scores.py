"""The report's scores, from whatever is left: intervals, baselines, classes, worst answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.html_page import HOSTILE, Page, assert_harmless
from vlm_tune.evaluation.assessment import assess, clusters_of, compare_answers
from vlm_tune.evaluation.metrics import Answer, scores
from vlm_tune.evaluation.texts import levenshtein
from vlm_tune.rendering import report_scores
from vlm_tune.rendering.report import write_report
from vlm_tune.rendering.report_scores import media_named, worst_answers

COLORS = ("red", "green", "blue")


def answers(run: Path) -> list[Answer]:
    """Thirty answers about ten images, of which every fifth is wrong."""
    rows = []
    for number in range(30):
        image = str(run / f"{number // 3}.png")
        expected = COLORS[number % 3]
        given = expected if number % 5 else COLORS[(number + 1) % 3] if number % 10 else "a long no"
        rows.append(
            Answer(
                str(number),
                image,
                f"question {number}?",
                expected,
                given,
                given == expected,
                "warm" if expected == "red" else "cold",
                "test",
                (image,),
            )
        )
    return rows


def summary_of(rows: list[Answer]) -> dict[str, Any]:
    result = scores(rows, {})
    measured = assess(result, ["exact_match", "f1_macro", "bleu"])
    worse = [replace(row, generated="red", correct=row.expected == "red") for row in rows]
    result.baselines = {
        "majority": compare_answers(measured, clusters_of(rows), worse)[0],
        "probe": compare_answers(measured, clusters_of(rows), rows)[0],
    }
    return result.summary()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with scores, but without a log, which would be drawn."""
    (tmp_path / "recipe.yaml").write_text("name: scored\n")
    rows = answers(tmp_path)
    for number in range(10):
        Image.new("RGB", (32, 32), (20 * number, 40, 90)).save(tmp_path / f"{number}.png")
    lines = "".join(json.dumps(row.__dict__ | {"references": {}}) + "\n" for row in rows)
    (tmp_path / "answers.jsonl").write_text(lines)
    (tmp_path / "result.json").write_text(json.dumps(summary_of(rows)))
    return tmp_path


def page_of(run: Path) -> tuple[str, str]:
    text = write_report(run).read_text(encoding="utf-8")
    return text, " ".join(" ".join(Page(text).text).split())


def test_every_score_has_its_interval(run: Path) -> None:
    _, words = page_of(run)
    entry = json.loads((run / "result.json").read_text())["metrics"]["exact_match"]
    ends = f"{100 * entry['low']:.2f}% to {100 * entry['high']:.2f}%"
    assert f"Test accuracy 80.00% of 30 questions, 95% interval {ends}" in words
    assert f"exact match 80.00% {ends} 30 10" in words
    assert "BLEU " in words and "F1 (macro) " in words
    assert (
        "Test accuracy by category category accuracy 95% interval F1 (macro) 95% interval" in words
    )


def test_baselines_say_whether_they_are_beaten(run: Path) -> None:
    _, words = page_of(run)
    assert "most frequent answer exact match 33.33% +46.67%" in words
    assert "linear probe exact match 80.00% +0.00% +0.00% to +0.00% 1.000 not shown" in words
    assert "<0.001 yes" in words or "0.002 yes" in words


def test_classes_have_a_matrix_and_a_table(run: Path) -> None:
    text, words = page_of(run)
    assert "blue green red no class" in words
    assert text.count('class="number hit"') == 3
    assert "class precision recall F1 questions blue" in words


def test_the_worst_answers_come_first_with_their_images(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, note = worst_answers(run)
    assert note == "6 wrong answers of the test part, the furthest first"
    monkeypatch.setattr(report_scores, "READ", 11)
    assert worst_answers(run)[1] == (
        "3 wrong answers of the first 11 of the test part, the furthest first"
    )
    monkeypatch.undo()
    distances = [
        levenshtein(row["answer"], row["expected"]) / max(len(row["answer"]), len(row["expected"]))
        for row in chosen
    ]
    assert distances == sorted(distances, reverse=True) and distances[0] > distances[-1]
    assert len({row["thumbnail"].name for row in chosen}) == 6
    _, words = page_of(run)
    assert "Worst answers 6 wrong answers of the test part" in words


def test_what_the_scores_lack_is_a_note(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    result |= {"notes": ["baseline blind left out"], "skipped": {"anls": "no row has a text"}}
    (run / "result.json").write_text(json.dumps(result))
    _, words = page_of(run)
    assert "Notes anls is not computed: no row has a text baseline blind left out" in words


def test_a_part_of_a_file_is_an_image_too(run: Path) -> None:
    content = (run / "0.png").read_bytes()
    (run / "media.bin").write_bytes(b"before" + content + b"after")
    media = media_named(run, f"{run / 'media.bin'}[6:{6 + len(content)}]")
    assert media is not None and media.read() == content
    assert media_named(run, "") is None


DAMAGES: list[dict[str, Any]] = [
    {"metrics": None, "baselines": 5, "classes": [1], "notes": 5, "skipped": [1]},
    {"metrics": {"exact_match": 3}, "baselines": {"majority": None}, "classes": {}},
    {"metrics": {"exact_match": {"value": 10**400}}, "classes": {"labels": ["a"], "matrix": [[1]]}},
    {
        "metrics": {"exact_match": {"value": 0.5, "low": "x", "high": None, "n": [], "images": {}}},
        "baselines": {"majority": {"exact_match": {"value": 1, "p": "x", "difference": None}}},
        "classes": {"labels": [5], "matrix": [["x", -1]], "rows": [{"precision": {}}]},
    },
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_scores_that_can_not_be_read_are_left_out(run: Path, damage: dict[str, Any]) -> None:
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | damage))
    for line in ("nothing", "[]", '{"question": 1}', '{"question": "q", "correct": false}'):
        with (run / "answers.jsonl").open("a") as file:
            file.write(line + "\n")
    _, words = page_of(run)
    assert "Test accuracy 80.00%" in words and "Worst answers 6 wrong" in words
    assert "nan" not in words and "None" not in words


@pytest.mark.parametrize("hostile", HOSTILE)
def test_names_and_answers_are_never_markup(run: Path, hostile: str) -> None:
    rows = [replace(row, expected=hostile, category=hostile) for row in answers(run)]
    wrong = {"references": {}, "correct": False}
    lines = "".join(json.dumps(row.__dict__ | wrong) + "\n" for row in rows)
    (run / "answers.jsonl").write_text(lines)
    result = summary_of([*rows[:20], *answers(run)[20:]])
    for key in ("metrics", "baselines"):
        result[key][hostile] = result[key].popitem()[1]
    (run / "result.json").write_text(json.dumps(result))
    text, words = page_of(run)
    assert_harmless(Page(text))
    assert " ".join(hostile.split()) in words
