"""All parts of a run are read before its weights, under one policy.

`check` says beforehand what training does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vlm_tune
from tests.helpers.audio_samples import hearing_recipe, write_tone_rows
from tests.helpers.tiny_models import parsed
from vlm_tune.api import evaluate, sft
from vlm_tune.data.prepare.job import PartName
from vlm_tune.data.prepare.run import prepared_parts, scratch_texts
from vlm_tune.data.types import Conversation
from vlm_tune.data_check.findings import CheckReport
from vlm_tune.errors import DataError, RecipeError
from vlm_tune.events import Event, Note
from vlm_tune.model.build import build_processor
from vlm_tune.resources import cache_folder
from vlm_tune.train.stage_data import read_stage

QUICK: dict[str, Any] = {"train__steps": 1, "train__log_every": 1}


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "log.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def part(folder: Path, name: str, lines: list[str]) -> list[dict[str, str]]:
    (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    return [{"kind": "file", "path": str(folder / f"{name}.jsonl"), "form": "messages"}]


def faults(report: CheckReport) -> list[tuple[str, str]]:
    """The errors as (part, kind).

    The tiny recipes' parts show the same images, which is an error of its own.
    """
    return [
        (finding.part, finding.kind)
        for finding in report.errors
        if not finding.kind.startswith("leak")
    ]


def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "vlm_tune.train.run.build", lambda *arguments, **more: pytest.fail("the model was built")
    )
    monkeypatch.setattr(
        "vlm_tune.train.stage.restore_model",
        lambda *arguments, **more: pytest.fail("the model was loaded"),
    )


def with_image(line: str, image: str) -> str:
    return json.dumps(json.loads(line) | {"images": [image]})


def cut_image(folder: Path) -> str:
    (folder / "cut.png").write_bytes((folder / "red.png").read_bytes()[:200])
    return "cut.png"


def test_samples_for_the_report_are_rows_that_can_be_used(
    tiny_recipe: Callable[..., str], color_rows: Path
) -> None:
    lines = color_rows.read_text().splitlines()
    color_rows.write_text(
        "\n".join([with_image(lines[0], cut_image(color_rows.parent)), *lines]) + "\n"
    )
    recipe = parsed(
        tiny_recipe("causal"),
        **QUICK,
        data__validation=[],
        data__on_bad_row="skip",
        evaluate__samples=4,
    )
    assert vlm_tune.check(recipe).exit_code == 0
    run = sft(recipe)
    shown = json.loads((run.folder / "samples.json").read_text())
    assert len(shown) == 4 and all(
        "cut.png" not in row["image"] and row["after"] is not None for row in shown
    )


def test_samples_of_a_stream_are_rows_that_can_be_used(
    tiny_recipe: Callable[..., str], color_rows: Path
) -> None:
    lines = color_rows.read_text().splitlines()
    color_rows.write_text(
        "\n".join([with_image(lines[0], cut_image(color_rows.parent)), "{bad", *lines]) + "\n"
    )
    changes = QUICK | {"data__validation": [], "data__on_bad_row": "skip", "data__streaming": True}
    run = sft(parsed(tiny_recipe("causal"), **changes, evaluate__samples=3))
    shown = json.loads((run.folder / "samples.json").read_text())
    assert len(shown) == 3 and all("cut.png" not in row["image"] for row in shown)


@pytest.mark.parametrize(
    ("lines", "message", "kind"),
    [
        (None, "no such file", "source"),
        (["{bad"], "row 1: .*JSON", "not_json"),
        (["cut"], "row 1: .*cut.png", "image_unreadable"),
        (["long"], "row 1: the prompt has .* tokens, more than data.max_length 128", "overlong"),
    ],
)
def test_a_fault_of_the_test_part_is_told_before_any_weights_are_loaded(
    lines: list[str] | None,
    message: str,
    kind: str,
    tiny_recipe: Callable[..., str],
    color_rows: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = color_rows.parent
    first = color_rows.read_text().splitlines()[0]
    spoiled = {
        "cut": with_image(first, cut_image(folder)),
        "long": first.replace("what color is it?", "word " * 100),
    }
    test = part(folder, "test", [*(spoiled.get(line, line) for line in lines or []), first])
    if lines is None:
        (folder / "test.jsonl").unlink()
    good = parsed(tiny_recipe("causal"), **QUICK)
    recipe = parsed(tiny_recipe("causal"), **QUICK, data__test=test)
    report = vlm_tune.check(recipe)
    assert faults(report) == [("test", kind)]
    if lines is None:
        sft(good)
    with monkeypatch.context() as patched:
        no_weights(patched)
        with pytest.raises(DataError, match=message):
            sft(recipe, overwrite=True)
        if lines is None:  # so is a run whose test part went since
            with pytest.raises(DataError, match=message):
                sft(recipe, resume=True, accept_changes=True)


@pytest.mark.parametrize("name", ["validation", "test"])
def test_bad_rows_to_score_are_counted_shown_and_quarantined(
    name: str, tiny_recipe: Callable[..., str], color_rows: Path
) -> None:
    folder, lines = color_rows.parent, color_rows.read_text().splitlines()
    spoiled = [
        "{bad",
        with_image(lines[0], cut_image(folder)),
        lines[1],
        lines[2].replace("what color is it?", "word " * 100),
    ]
    changes = QUICK | {
        f"data__{name}": part(folder, name, spoiled),
        "data__on_bad_row": "quarantine",
        "data__overlong": "drop",
    }
    recipe = parsed(tiny_recipe("causal"), **changes, evaluate__samples=0)
    report = vlm_tune.check(recipe)
    assert faults(report) == []
    of_part = [(finding.row, finding.kind) for finding in report.warnings if finding.part == name]
    assert {(1, "not_json"), (2, "image_unreadable"), (4, "overlong")} <= set(of_part)
    run = sft(recipe)
    rows = [json.loads(line) for line in (run.folder / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["part"], row["row"], row["kind"]) for row in rows] == [
        (name, 1, "not_json"),
        (name, 2, "image_unreadable"),
    ]
    assert rows[0]["content"] == ""
    notes = [
        event["text"]
        for event in events(run.folder, "note")
        if event["text"].startswith(f"left out of {name}: ")
    ]
    assert len(notes) == 3
    scored = run.result["n"] if name == "test" else events(run.folder, "evaluate")[0]["n"]
    assert scored == 1 == evaluate(run.folder, split=name).n


def test_a_part_with_no_row_left_and_one_with_too_many_bad_rows_stop_the_run(
    tiny_recipe: Callable[..., str], color_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = color_rows.read_text().splitlines()
    empty = {
        "data__validation": part(color_rows.parent, "validation", ["{bad"]),
        "data__on_bad_row": "skip",
    }
    recipe = parsed(tiny_recipe("causal"), **QUICK, **empty)
    assert faults(vlm_tune.check(recipe)) == [("validation", "no_rows")]
    no_weights(monkeypatch)
    with pytest.raises(
        DataError, match=r"data\.validation: no row is left to score, of 1; the first: .*row 1"
    ):
        sft(recipe)
    capped = {
        "data__validation": part(color_rows.parent, "capped", ["{bad", "{bad", lines[0]]),
        "data__on_bad_row": "skip",
    }
    recipe = parsed(tiny_recipe("causal"), **QUICK, **capped, data__max_bad_rows=1)
    assert faults(vlm_tune.check(recipe)) == [("validation", "too_many_bad")]
    with pytest.raises(DataError, match="2 bad rows, more than 1"):
        sft(recipe, overwrite=True)


@pytest.fixture
def sixty(tmp_path: Path) -> Path:
    """Sixty rows about an image each, the first of them cut."""
    rows = []
    for number in range(60):
        Image.new("RGB", (16, 16), (4 * number, 200 - 3 * number, number)).save(
            tmp_path / f"{number}.png"
        )
        rows.append(
            {
                "image": f"{number}.png",
                "question": f"what is {number}?",
                "answer": f"it is {number}",
            }
        )
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes()[:40])
    path = tmp_path / "sixty.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_worked_examples_come_from_training_rows_and_leave_the_split_as_it_is(
    tiny_recipe: Callable[..., str], sixty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_tune.data.sources.base.CHUNK_ROWS", 7)
    changes: dict[str, Any] = QUICK | {
        "data__validation": [],
        "data__split": {"validation": 0.2, "test": 0.2},
    }
    changes |= {"data__on_bad_row": "skip", "evaluate__samples": 0, "data__max_length": 512}
    rows: dict[int, dict[str, list[Conversation]]] = {}
    for shots in (0, 2):
        source = {"kind": "file", "path": str(sixty), "shots": shots}
        recipe = parsed(tiny_recipe("causal"), **changes, data__train=[source])
        report = vlm_tune.check(recipe)
        assert report.exit_code == 0, report.errors
        assert {part.part: part.sources[0].usable for part in report.parts} == {
            "train": 35,
            "validation": 12,
            "test": 12,
        }
        processor = build_processor(recipe, scratch_texts(recipe))
        (prepared,) = prepared_parts(recipe.data, "train", processor, 0)
        parts: tuple[PartName, ...] = ("train", "validation", "test")
        rows[shots] = {part: list(prepared.conversations(prepared.places(part))) for part in parts}
    for name in ("train", "validation", "test"):
        assert [row.id for row in rows[2][name]] == [row.id for row in rows[0][name]]
    trained = {row.media[-1] for row in rows[2]["train"]}
    for row in [row for part in rows[2].values() for row in part]:
        assert (
            row.shots == 4
            and len(row.media) == 3
            and set(row.media[:2]) <= trained - {row.media[-1]}
        )
    run = sft(recipe)
    assert run.result["n"] == 12 and events(run.folder, "evaluate")[0]["n"] == 12
    assert events(run.folder, "stage")[0]["questions"] == 35


def test_a_split_that_can_not_be_is_an_error_with_its_numbers(
    tiny_recipe: Callable[..., str], color_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.loads(line) for line in color_rows.read_text().splitlines()]
    color_rows.write_text("".join(json.dumps(row | {"images": ["red.png"]}) + "\n" for row in rows))
    changes = QUICK | {"data__validation": [], "data__split": {"validation": 0.25}}
    recipe = parsed(tiny_recipe("causal"), **changes)
    assert faults(vlm_tune.check(recipe)) == [("validation", "split")]
    no_weights(monkeypatch)
    expected = (
        r"data\.split: validation holds out 0 of 8 .* share of 0\.25 \(2\.0 rows\).* 1 "
        r"groups, the largest of 8 rows"
    )
    with pytest.raises(DataError, match=expected):
        sft(recipe)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"train__batch_tokens": 8}, "8 of 8 rows are over train.batch_tokens 8, the longest"),
        ({"data__packing": True, "data__row_length": 8}, "8 of 8 rows are over data.row_length 8,"),
        (
            {"data__group": "image", "data__row_length": 8, "train__batch_tokens": 8},
            "4 of 4 images with their rows are over train.batch_tokens 8",
        ),
        (
            {"data__group": "image", "data__row_length": 8},
            "8 of 8 rows are over data.row_length 8,",
        ),
        (
            {"data__streaming": True, "data__packing": True, "data__row_length": 8},
            "data.max_length 128 tokens, more than",
        ),
        (
            {"data__packing": True, "data__row_length": 200, "train__batch_tokens": 100},
            "a packed row may have data.row_length 200",
        ),
        ({"data__packing": True, "data__row_length": 200, "train__batch_tokens": 200}, None),
        ({"data__row_length": 20}, None),
    ],
)
def test_a_bound_that_rows_are_too_long_for_is_told(
    changes: dict[str, Any], line: str | None, tiny_recipe: Callable[..., str]
) -> None:
    recipe = parsed(tiny_recipe("causal"), **QUICK, **changes, data__validation=[])
    warnings = [
        finding.message for finding in vlm_tune.check(recipe).warnings if finding.kind == "bound"
    ]
    events: list[Event] = []
    read_stage(
        recipe,
        build_processor(recipe, scratch_texts(recipe)),
        last=True,
        report=events.append,
        stop=lambda: False,
        quarantine=None,
    )
    notes = [event.text for event in events if isinstance(event, Note)]
    if not recipe.data.streaming:
        assert notes == warnings
    assert any(line in note for note in notes) if line else notes == []


@pytest.mark.parametrize("number", [0, -1])
def test_numbers_of_rows_that_are_none_are_refused(
    number: int, tiny_recipe: Callable[..., str]
) -> None:
    recipe = parsed(tiny_recipe("causal"))
    with pytest.raises(RecipeError, match="--limit"):
        evaluate("nowhere", recipe, limit=number)
    with pytest.raises(RecipeError, match="--sample"):
        vlm_tune.check(recipe, sample=number)
    with pytest.raises(RecipeError, match="limit"):
        parsed(
            tiny_recipe("causal"),
            data__train=[{"kind": "file", "path": "x.jsonl", "limit": number}],
        )


def test_scores_are_told_by_source(tiny_recipe: Callable[..., str], color_rows: Path) -> None:
    lines = color_rows.read_text().splitlines()
    first, second = (
        part(color_rows.parent, "first", lines[:3]),
        part(color_rows.parent, "second", lines[3:]),
    )
    named = [{**second[0], "name": "the others"}]
    changes = QUICK | {
        "data__validation": [*first, *named],
        "data__test": [*first, *named],
        "evaluate__samples": 0,
    }
    run = sft(parsed(tiny_recipe("causal"), **changes))
    assert {name: entry["n"] for name, entry in run.result["by_source"].items()} == {
        "first": 3,
        "the others": 5,
    }
    (event,) = events(run.folder, "evaluate")
    assert {name: entry["n"] for name, entry in event["by_source"].items()} == {
        "first": 3,
        "the others": 5,
    }
    pooled = (
        sum(entry["loss"] * entry["tokens"] for entry in event["by_source"].values())
        / event["tokens"]
    )
    assert event["loss"] == pytest.approx(pooled)
    assert "Test accuracy by source" in (run.folder / "report.html").read_text()
    again = evaluate(run.folder)
    assert again.by_source == run.result["by_source"] and {
        answer.source for answer in again.answers
    } == set(again.by_source)
    entry = run.result["metrics"]["exact_match"]
    assert (entry["value"], entry["n"], entry["images"]) == (run.result["accuracy"], 8, 4)
    assert entry == again.metrics["exact_match"] and entry["low"] < entry["value"] < entry["high"]
    # The tower is frozen, and its features are cached.
    assert {"majority", "same_question", "nearest", "blind"} == run.result["baselines"].keys()
    assert run.result["baselines"]["nearest"]["exact_match"]["value"] == 1.0
    assert again.baselines == run.result["baselines"]
    # A source's name changes nothing of what is prepared or trained on.
    assert len(list(cache_folder("prepared").glob("*/examples.arrow"))) == 2


def test_the_test_part_is_scored_in_part_or_not_at_all(
    tiny_recipe: Callable[..., str], color_rows: Path
) -> None:
    test = [{"kind": "file", "path": str(color_rows)}]
    text, changes = (
        tiny_recipe("causal"),
        QUICK | {"data__test": test, "data__validation": [], "evaluate__samples": 0},
    )
    assert sft(parsed(text, **changes, evaluate__test_limit=3)).result["n"] == 3
    run = sft(parsed(text, **changes), test=False, overwrite=True)
    assert (
        "n" not in run.result
        and "accuracy" not in run.result
        and not (run.folder / "answers.jsonl").exists()
    )


@pytest.mark.parametrize("modality", ["audio", "video"])
def test_a_run_on_clips_or_videos_is_validated_and_scored(
    modality: str, tiny_recipe: Callable[..., str], color_rows: Path, tmp_path: Path
) -> None:
    """Its scores say what they are about, in the log and in the result."""
    if modality == "audio":
        text = hearing_recipe("causal", write_tone_rows(tmp_path), tmp_path / "run")
        path = tmp_path / "clips.jsonl"
    else:
        text = tiny_recipe("causal")
        path = color_rows.with_name("videos.jsonl")
        video = color_rows.with_name("frames")
        video.mkdir()
        for image in color_rows.parent.glob("*.png"):
            (video / image.name).write_bytes(image.read_bytes())
        row = {"question": "what?", "answer": "colors", "video": "frames"}
        path.write_text("".join(json.dumps(row | {"id": str(place)}) + "\n" for place in range(4)))
    source = [{"kind": "file", "path": str(path)}]
    parts = {f"data__{name}": source for name in ("train", "validation", "test")}
    run = sft(parsed(text, **parts, **QUICK, evaluate__samples=0))
    assert [event["modality"] for event in events(run.folder, "evaluate")] == [modality]
    assert [event["modality"] for event in events(run.folder, "test")] == [modality]
    assert json.loads((run.folder / "result.json").read_text())["modality"] == modality
