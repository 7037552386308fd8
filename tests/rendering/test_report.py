"""The report: complete, self-contained, safe against the text it shows.

It is content with whatever a run has left.
"""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.audio_samples import tone, wav
from tests.helpers.html_page import HOSTILE, Page, assert_harmless
from vlm_tune.errors import RecipeError
from vlm_tune.rendering.report import write_report


def stage_events(stage: int, name: str, steps: int = 40) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = [
        {
            "event": "stage",
            "stage": stage,
            "name": name,
            "steps": steps,
            "questions": 7000,
            "images": 3800,
            "time": 1.7e9,
        }
    ]
    for step in range(10, steps + 1, 10):
        common = {"stage": stage, "name": name, "step": step, "time": 1.7e9 + step}
        events.append(
            {
                "event": "train",
                **common,
                "of": steps,
                "loss": 8 / step,
                "learning_rate": 1e-3,
                "questions_per_s": 900.0,
            }
        )
        events.append(
            {
                "event": "evaluate",
                **common,
                "loss": 9 / step,
                "accuracy": 0.5 + step / 100,
                "n": 400,
                "by_category": {},
            }
        )
    return events


def write_log(run: Path, events: list[dict[str, Any]], tail: str = "") -> None:
    (run / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + tail)


@pytest.fixture
def uncharted(run: Path) -> Path:
    """As `run`, but its log has only the first stage's start.

    Charts take most of a report's time.
    """
    write_log(run, stage_events(0, "align")[:1])
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A whole run of two stages."""
    (tmp_path / "recipe.yaml").write_text("name: two-stages\nseed: 7\n")
    rows = [
        {
            "match": "tower.*",
            "how": "frozen",
            "learning_rate": None,
            "trained": 0,
            "total": 506008,
            "detail": "",
        },
        {
            "match": "llm.*",
            "how": "lora",
            "learning_rate": 0.0005,
            "trained": 294912,
            "total": 76961152,
            "detail": "r=16, alpha=32",
        },
    ]
    (tmp_path / "tuning.json").write_text(
        json.dumps([{"stage": "align", "rows": rows}, {"stage": "instruct", "rows": rows[:1]}])
    )
    write_log(
        tmp_path,
        [
            *stage_events(0, "align"),
            {"event": "note", "text": "left out: row 118"},
            *stage_events(1, "instruct"),
        ],
    )
    Image.new("RGB", (64, 48), (200, 30, 30)).save(tmp_path / "tiny.png")
    Image.new("RGB", (900, 300), (30, 30, 200)).save(tmp_path / "large.png")
    samples = [
        {
            "id": "a",
            "image": str(tmp_path / "tiny.png"),
            "question": "which shape?",
            "expected": "circle",
            "before": "no",
            "after": "Circle.",
        },
        {
            "id": "b",
            "image": str(tmp_path / "large.png"),
            "question": "which color?",
            "expected": "blue",
            "before": None,
            "after": "red",
        },
    ]
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    result = {
        "accuracy": 0.98123,
        "n": 9673,
        "seconds": 180.2,
        "peak_memory_mb": 1900,
        "loss": 0.05,
    }
    result["by_category"] = {
        "color": {"accuracy": 1.0, "n": 1642},
        "boolean": {"accuracy": 0.99971, "n": 6400},
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    return tmp_path


def report(run: Path) -> tuple[str, Page]:
    path = write_report(run)
    assert path == run / "report.html"
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def edit(path: Path, change: dict[str, Any]) -> None:
    """Changes keys of a JSON object, or of the first object of a JSON list."""
    value = json.loads(path.read_text())
    (value[0] if isinstance(value, list) else value).update(change)
    path.write_text(json.dumps(value))


def test_shows_every_part(run: Path) -> None:
    _, page = report(run)
    for words in (
        "two-stages seed 7, started 2023-11-14 22:13 UTC",
        "Test accuracy 98.12% of 9,673 questions",
        "Training time 3 min 00 s",
        "Peak memory 1,900 MB",
        "color 100.0% 1,642 boolean >99.9% 6,400",
        "Stage 1: align 40 steps, 7,000 questions, 3,800 images",
        "training, last 0.2 validation, lowest 0.225 at 40",
        "validation, best 90.0% at 40",
        "highest 0.001 mean 900 questions/s",
        "Stage 2: instruct",
        "llm.* lora 0.0005 294,912 76,961,152 0.38% r=16, alpha=32",
        "together 294,912 77,467,160 0.38%",
        "before training 0 of 1 right, after training 1 of 2 right",
        "which shape? expected circle before ✗ no after ✓ Circle.",
        "which color? expected blue before – after ✗ red",
        "left out: row 118",
        "Recipe name: two-stages seed: 7",
    ):
        assert words in re.sub(r"\s+", " ", page.words)
    assert [svg["aria-label"] for svg in page.all("svg")] == 2 * [
        f"{name} against step" for name in ("Loss", "Exact match", "Learning rate and speed")
    ]


def test_right_and_wrong_have_colour_and_mark(uncharted: Path) -> None:
    text, _ = report(uncharted)
    assert re.search(
        r'<dd class="right"><span role="img" aria-label="right">✓ </span>Circle\.</dd>', text
    )
    assert re.search(
        r'<dd class="wrong"><span role="img" aria-label="wrong">✗ </span>red</dd>', text
    )


def test_images_are_small_inline_pngs(uncharted: Path) -> None:
    _, page = report(uncharted)
    tiny, large = page.all("img")
    images = [
        Image.open(
            io.BytesIO(
                base64.b64decode((image["src"] or "").removeprefix("data:image/png;base64,"))
            )
        )
        for image in (tiny, large)
    ]
    assert [image.size for image in images] == [(64, 48), (192, 64)]
    assert [image.getpixel((5, 5)) for image in images] == [(200, 30, 30), (30, 30, 200)]
    assert (tiny["class"], large["class"]) == ("picture tiny", "picture")


@pytest.mark.parametrize("hostile", HOSTILE)
def test_text_is_never_markup(uncharted: Path, hostile: str) -> None:
    plain = {tag for tag, _ in report(uncharted)[1].elements} | {"section", "ul", "li"}
    run = uncharted
    (run / "recipe.yaml").write_text(
        f"name: {json.dumps(hostile)}\nseed: {json.dumps(hostile)}\n# {hostile}\n"
    )
    strings = dict.fromkeys(("id", "question", "expected", "before", "after"), hostile)
    Image.new("RGB", (8, 8)).save(run / '"onload="a.png')
    edit(run / "samples.json", {**strings, "image": str(run / '"onload="a.png')})
    tuning = {
        "match": hostile,
        "how": hostile,
        "learning_rate": 1e-3,
        "trained": 1,
        "total": 2,
        "detail": hostile,
    }
    (run / "tuning.json").write_text(json.dumps([{"stage": hostile, "rows": [tuning]}]))
    edit(run / "result.json", {"by_category": {hostile: {"accuracy": 1.0, "n": 1}}})
    write_log(run, [*stage_events(0, hostile)[:1], {"event": "note", "text": hostile}])
    text, page = report(run)
    assert "<" not in hostile or hostile not in text
    assert {tag for tag, _ in page.elements} <= plain
    assert_harmless(page)
    # title, h1, seed, question, three answers, type, stage heading, stage of the table, match, how,
    # detail, note; three in the recipe
    assert page.words.count(hostile) == 17
    assert page.words.count("✓") == 2


def test_is_self_contained(run: Path) -> None:
    text, page = report(run)
    assert not re.search(r"https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", text))
    assert_harmless(page)
    policy = next(
        meta["content"]
        for meta in page.all("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_chart_references_resolve_to_equal_shapes(run: Path) -> None:
    text, _ = report(run)
    shapes: dict[str, set[str]] = {}
    for name, shape in re.findall(
        r'<(?:clipPath|path) id="([^"]+)"(.*?)(?:/>|</clipPath>)', text, re.DOTALL
    ):
        shapes.setdefault(name, set()).add(re.sub(r"\s+", " ", shape))
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    assert used
    assert used <= shapes.keys()
    assert all(len(shapes[name]) == 1 for name in used)


def test_charts_take_the_themes_colours(run: Path) -> None:
    text, _ = report(run)
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert set(re.findall(r"(?:fill|stroke): ?(#\w+)", svg)) == set()
        assert "var(--soft)" in svg
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= set(re.findall(r"(--[\w-]+):", text))


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("tuning.json", "What was trained"),
        ("log.jsonl", "Stage 1"),
        ("samples.json", "Samples"),
        ("result.json", "Test accuracy"),
    ],
)
@pytest.mark.parametrize("content", [None, "", '{"cut": [', "null", "[3]", '"text"'])
def test_a_file_that_is_missing_or_damaged_leaves_its_part_out(
    uncharted: Path, name: str, gone: str, content: str | None
) -> None:
    run = uncharted
    assert gone in report(run)[1].words
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_text(content)
    words = report(run)[1].words
    assert gone not in words
    assert all(
        part in words
        for part in {"What was trained", "Stage 1", "Samples", "Test accuracy"} - {gone}
    )


def test_recipe_alone_is_enough_and_needed(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: fresh\n")
    _, page = report(tmp_path)
    assert page.words == "fresh fresh Recipe name: fresh"
    (tmp_path / "recipe.yaml").unlink()
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        write_report(tmp_path)


def test_figures_that_are_missing_or_not_finite_are_left_out(run: Path) -> None:
    edit(
        run / "result.json",
        {
            "accuracy": 10**400,
            "n": None,
            "loss": float("nan"),
            "by_category": {"color": {"accuracy": None}},
        },
    )
    write_log(
        run,
        [
            {**event, "loss": None if event["event"] == "evaluate" else float("inf")}
            for event in stage_events(0, "align")
        ],
    )
    words = report(run)[1].words
    assert "Training time" in words
    assert not any(part in words for part in ("Test accuracy", "Test loss", "nan", "inf", "None"))
    assert [svg["aria-label"] for svg in Page((run / "report.html").read_text()).all("svg")] == [
        "Exact match against step",
        "Learning rate and speed against step",
    ]


def test_images_that_cannot_be_shown_do_not_stop_it(uncharted: Path) -> None:
    (uncharted / "tiny.png").write_bytes((uncharted / "tiny.png").read_bytes()[:60])
    (uncharted / "large.png").unlink()
    samples = json.loads((uncharted / "samples.json").read_text())
    (uncharted / "samples.json").write_text(
        json.dumps([*samples, {"question": "no picture?", "image": ""}, {"image": "a\0b"}])
    )
    _, page = report(uncharted)
    assert page.all("img") == []
    assert page.words.count("the image can't be read") == 3
    assert "no image no picture?" in page.words


@pytest.mark.parametrize(
    "tail", ['{"event":"train","stage":0,"st', '{"event":"train","stage":0,"name":"al\xc3', "\n\n"]
)
def test_a_cut_last_line_costs_nothing_else(run: Path, tail: str) -> None:
    write_log(run, stage_events(0, "align")[:3])
    whole = report(run)[0]
    with (run / "log.jsonl").open("ab") as file:
        file.write(tail.encode("latin-1"))
    assert report(run)[0] == whole


def test_an_interrupted_stage_says_where_its_log_ends(run: Path) -> None:
    assert "the log ends" not in report(run)[1].words
    write_log(run, stage_events(0, "align")[:5])
    assert (
        "40 steps, 7,000 questions, 3,800 images, the log ends at step 20" in report(run)[1].words
    )


def test_steps_taken_again_after_a_resume_count_once(run: Path) -> None:
    events = stage_events(0, "align")
    write_log(run, [*events[:-2], *stage_events(0, "align")])
    again = report(run)[0]
    write_log(run, events)
    assert again == report(run)[0]


@pytest.mark.parametrize("loss", [1.2, 0.0])
def test_a_single_point_is_drawn(run: Path, loss: float) -> None:
    stage, train, evaluation, *_ = stage_events(0, "align")
    write_log(
        run,
        [stage, {**train, "loss": loss}, {**evaluation, "loss": loss, "accuracy": loss and 1.0}],
    )
    text, page = report(run)
    assert len(page.all("svg")) == 3
    for svg, inks in zip(
        re.findall(r"<svg.*?</svg>", text, re.DOTALL),
        (("train", "validation"), ("validation",), ("train",)),
        strict=True,
    ):
        # A line through one point shows nothing: there must be a marker of its colour, inside the
        # picture.
        for ink in inks:
            x, y = map(
                float,
                re.search(
                    rf'<use [^>]*x="([\d.-]+)" y="([\d.-]+)" style="fill: var\(--{ink}\)', svg
                ).groups(),
            )  # type: ignore[union-attr]
            assert 0 < x < 303
            assert 0 < y < 181


def test_loss_over_many_magnitudes_is_on_a_log_scale(run: Path) -> None:
    events = [event for event in stage_events(0, "align") if event["event"] != "evaluate"]
    write_log(
        run,
        [
            {**event, "loss": 30.0 / event.get("step", 1) ** 2} if "loss" in event else event
            for event in events
        ],
    )
    assert "log scale" not in report(run)[1].words
    write_log(
        run,
        [
            {**event, "loss": 3000.0 / event["step"] ** 3} if "loss" in event else event
            for event in events
        ],
    )
    assert "log scale" in report(run)[1].words


def test_lone_surrogates_in_an_answer_are_replaced(uncharted: Path) -> None:
    edit(uncharted / "samples.json", {"after": "a\ud800b"})
    assert "✗ a?b" in report(uncharted)[1].words


def test_a_run_on_clips_of_audio_calls_nothing_an_image(uncharted: Path) -> None:
    """Its counts, its scores and its samples."""
    (event,) = stage_events(0, "main")[:1]
    write_log(uncharted, [event | {"images": 0, "clips": 2}])
    (uncharted / "low.wav").write_bytes(wav(tone()))
    sample = {"id": "a", "image": "low.wav", "question": "q", "expected": "a", "before": "b"}
    (uncharted / "samples.json").write_text(json.dumps([sample | {"after": "a"}]))
    entry = {"value": 1.0, "low": 0.5, "high": 1.0, "n": 4, "images": 2}
    result = {"accuracy": 1.0, "n": 4, "modality": "audio", "metrics": {"exact_match": entry}}
    (uncharted / "result.json").write_text(json.dumps(result))
    text = write_report(uncharted).read_text()
    body = text[text.index("<main") if "<main" in text else text.index("<body") :]
    assert "2 audio clips" in body and "audio: low.wav" in body
    assert "questions about one clip as one draw" in body
    assert not re.search(r"\bimages?\b", body)
