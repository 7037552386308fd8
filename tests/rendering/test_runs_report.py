"""The report of several runs: overlaid curves, scores, paired differences and flipped rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vlm_tune
from tests.helpers.html_page import HOSTILE, Page, assert_harmless
from tests.helpers.tiny_models import cli
from tests.rendering.test_report import stage_events, write_log
from vlm_tune.errors import RecipeError
from vlm_tune.evaluation.answer_files import save_answers
from vlm_tune.evaluation.assessment import assess
from vlm_tune.evaluation.metrics import Answer, scores
from vlm_tune.rendering import runs_report
from vlm_tune.rendering.charts import MARKERS, RUN_STROKES

RECIPE = (Path(__file__).parents[2] / "recipes" / "demo.yaml").read_text(encoding="utf-8")


def answers(place: Path, right: set[int], question: str = "is it") -> list[Answer]:
    """Twelve answers about six images."""
    rows = []
    for number in range(12):
        image = str(place / f"{number // 2}.png")
        given = "yes" if number in right else "no"
        rows.append(
            Answer(
                f"row {number}",
                image,
                f"{question} {number}?",
                "yes",
                given,
                number in right,
                "even" if number % 2 == 0 else "odd",
                "test",
                (image,),
            )
        )
    return rows


def write_run(
    folder: Path,
    rows: list[Answer] | None,
    changes: tuple[str, str] = ("", ""),
    log: list[dict[str, Any]] | None = None,
) -> Path:
    """A run's folder with scored answers, where there are some, and a log where it is given."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE.replace(*changes) if changes[0] else RECIPE)
    if log is not None:
        write_log(folder, log)
    if rows is not None:
        save_answers(folder / "answers.jsonl", rows)
        result = scores(rows, {})
        assess(result, ["exact_match"])
        (folder / "result.json").write_text(json.dumps(result.summary()))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs whose answers differ in four rows, without logs: charts take most of the time."""
    for number in range(6):
        Image.new("RGB", (32, 32), (40 * number, 40, 90)).save(tmp_path / f"{number}.png")
    return [
        write_run(tmp_path / "first", answers(tmp_path, {0, 1, 2, 3})),
        write_run(
            tmp_path / "second",
            answers(tmp_path, {1, 2, 3, 4, 5, 6}),
            ("learning_rate: 1.0e-3", "learning_rate: 5.0e-3"),
        ),
    ]


def page_of(runs: list[Path], path: Path) -> tuple[Page, str]:
    page = Page(vlm_tune.report(runs, path).read_text(encoding="utf-8"))
    assert_harmless(page)
    return page, " ".join(page.words.split())


def test_scores_differences_and_flipped_rows_of_two_runs(runs: list[Path], tmp_path: Path) -> None:
    page, words = page_of(runs, tmp_path / "page.html")
    comparison = vlm_tune.compare(*runs)
    entry = comparison.metrics["exact_match"]
    low, high = (100 * entry[f"difference_{end}"] for end in ("low", "high"))
    ends = f"{low:+.2f}% to {high:+.2f}%".replace("-", "−")
    assert f"+16.67% {ends} {entry['p']:.3f} 33.33% 50.00% 12" in words
    assert "category ● A ■ B even 33.33% 50.00% odd 33.33% 50.00%" in words
    assert "Right in B, wrong in A 3 of 12 rows, by exact match" in words
    assert "Right in A, wrong in B 1 of 12 rows, by exact match" in words
    assert "is it 0? expected yes A ✓ yes B ✗ no" in words
    assert len(page.all("img")) == 4
    assert comparison.recipe
    assert all(change in words for change in comparison.recipe)


def test_no_more_flipped_rows_than_fit_and_each_on_another_image_first(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_report, "FLIPS", 2)
    _, words = page_of(runs, tmp_path / "page.html")
    assert "2 of 3 of 12 rows" in words
    assert "is it 4?" in words and "is it 6?" in words and "is it 5?" not in words


def test_curves_are_overlaid_and_differ_by_more_than_color(tmp_path: Path) -> None:
    events = stage_events(0, "align")
    steeper = [
        {**event, "loss": event["loss"] / 2} if "loss" in event else event
        for event in stage_events(0, "align", 80)
    ]
    runs = [
        write_run(tmp_path / "short", None, log=events),
        write_run(tmp_path / "long", None, log=steeper),
    ]
    page, words = page_of(runs, tmp_path / "page.html")
    charts = [each["aria-label"] for each in page.all("svg") if each.get("role") == "img"]
    assert charts == [
        f"{title} against step"
        for title in ("Training loss", "Validation loss", "Validation: exact match")
    ] + ["Learning rate against step"]
    assert "Curves: align steps: A 40, B 80" in words
    assert "● A demo: last 0.2 ■ B demo: last 0.05" in words
    styles = [style for each in page.all("path") if "none" in (style := each.get("style") or "")]
    for number, dashed in ((1, False), (2, True)):
        dashes = ["dasharray" in style for style in styles if f"--run-{number})" in style]
        assert dashes == [dashed] * len(charts)
    assert "no paired differences of B to A: A has no test answers (answers.jsonl)" in words
    assert "Test scores" not in words


def test_runs_about_different_media_name_each_in_the_plural(
    runs: list[Path], tmp_path: Path
) -> None:
    path = runs[1] / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "modality": "audio"}))
    _, words = page_of(runs, tmp_path / "page.html")
    assert "95% interval questions images or clips" in words
    assert "95% intervals treat questions about one image or clip as one draw" in words
    assert "a paired test swaps the answers of one image or clip at a time" in words


def test_no_two_runs_look_alike_without_color() -> None:
    assert len({stroke.dashes for stroke in RUN_STROKES}) == len(RUN_STROKES)
    assert len({MARKERS[stroke.marker] for stroke in RUN_STROKES}) == len(RUN_STROKES)


def test_runs_on_other_rows_are_shown_without_differences(runs: list[Path], tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", answers(tmp_path, {0}, "was it"))
    _, words = page_of([*runs, other], tmp_path / "page.html")
    assert "3 runs" in words
    assert "no paired differences of C to A: the rows differ: 12 with another question" in words
    assert "▲ C 8.33%" in words
    assert "Right in B, wrong in A" in words and "wrong in C" not in words


def test_damaged_files_leave_their_part_out(runs: list[Path], tmp_path: Path) -> None:
    (runs[0] / "answers.jsonl").write_text('{"id": 1}\n')
    (runs[0] / "result.json").write_text('{"metrics": [], "by_category": 3')
    (runs[1] / "recipe.yaml").write_text("name: [\n")
    _, words = page_of(runs, tmp_path / "page.html")
    assert "row 1" in words
    assert "is no scored answer" in words
    assert "not known: a recipe can't be read" in words


def test_text_of_a_run_is_not_markup(runs: list[Path], tmp_path: Path) -> None:
    for place, text in enumerate(HOSTILE):
        rows = answers(tmp_path, {place}, text)
        run = write_run(tmp_path / f"hostile {place}", rows)
        (run / "recipe.yaml").write_text(f"name: {json.dumps(text)}\n")
        same = write_run(tmp_path / f"same {place}", answers(tmp_path, {5}, text))
        _, words = page_of([run, same], tmp_path / "page.html")
        assert " ".join(f"{text} 5?".split()) in words


def test_one_run_is_written_into_its_folder(runs: list[Path]) -> None:
    assert vlm_tune.report(runs[0]) == runs[0] / "report.html"
    assert "Worst answers" in (runs[0] / "report.html").read_text(encoding="utf-8")


def test_what_is_no_run_or_too_many_is_refused(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("my notes\n")
    with pytest.raises(RecipeError, match="nowhere: no such folder"):
        vlm_tune.report([runs[0], tmp_path / "nowhere"])
    with pytest.raises(RecipeError, match="not the folder of a run"):
        vlm_tune.report([runs[0], tmp_path / "empty"])
    with pytest.raises(RecipeError, match="overlays 6 runs at most, got 8"):
        vlm_tune.report(runs * 4, tmp_path / "page.html")
    with pytest.raises(RecipeError, match="expected folders of runs, got"):
        vlm_tune.report([])
    with pytest.raises(RecipeError, match="would replace another file"):
        vlm_tune.report(runs, tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "my notes\n"


def test_the_command_writes_a_page_where_it_is_called(runs: list[Path], tmp_path: Path) -> None:
    printed = cli("report", "first", "second", "--json", cwd=tmp_path)
    assert json.loads(printed) == {"report": "report.html"}
    assert "Paired differences" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("modality", "noun"), [("audio", "clip"), ("video", "video")])
def test_runs_on_clips_or_videos_call_nothing_an_image(
    modality: str, noun: str, runs: list[Path], tmp_path: Path
) -> None:
    for run in runs:
        result = json.loads((run / "result.json").read_text())
        (run / "result.json").write_text(json.dumps(result | {"modality": modality}))
    runs_report.write_runs_report(runs, tmp_path / "page.html")
    words = Page((tmp_path / "page.html").read_text()).words
    assert f"questions about one {noun} as one draw" in words
    assert f"swaps the answers of one {noun} at a time" in words and f"{noun}s" in words
    assert not re.search(r"\bimages?\b", words)
