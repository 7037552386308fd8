"""`vlm-tune check` finds what is planted, by row, without weights.

Its figures are those of the rows.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

import vlm_tune
from tests.helpers.audio_samples import hearing_recipe, write_tone_rows
from tests.helpers.tiny_models import built, cli, parsed, rows_of, save_llm, with_llm
from vlm_tune.data_check.findings import histogram
from vlm_tune.data_check.row_errors import BAD_ROWS, KINDS
from vlm_tune.errors import ModelError
from vlm_tune.rendering.check_page import write_page
from vlm_tune.rendering.check_text import show_check

Row = dict[str, Any] | str


def picture(path: Path, seed: int) -> str:
    """A smooth picture, unlike those of other seeds; its name."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((96, 96), Image.Resampling.BICUBIC).save(path)
    return path.name


def chat(question: str, answer: str, image: str | None = None, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **({"images": [image]} if image else {}), **more}


def llava(question: str, answer: str, image: str | None = None) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **({"image": image} if image else {})}


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


def recipe_text(
    tiny_recipe: Callable[..., str],
    sources: dict[str, list[Path]],
    *,
    kind: str = "causal",
    more: str = "",
) -> str:
    head, _, rest = tiny_recipe(kind).partition("data:\n")
    tail = rest[rest.index("  template:") :]
    lines = [
        f"  {part}: [{', '.join(f'{{kind: file, path: {path}}}' for path in paths)}]\n"
        for part, paths in sources.items()
    ]
    return (
        head
        + "data:\n"
        + "".join(lines)
        + tail.replace("  max_length: 128\n", f"  max_length: 128\n{more}")
    )


@pytest.fixture
def planted(
    tmp_path: Path,
) -> tuple[dict[str, list[Path]], set[tuple[str, int, str]], set[tuple[str, int, str]]]:
    """Sources with twelve faults, and the (file, row, kind) of errors and of warnings."""
    data = tmp_path / "data"
    data.mkdir()
    for number in range(10):
        picture(data / f"{number}.png", number)
    picture(tmp_path / "outside.png", 99)
    (data / "copy.png").write_bytes((data / "2.png").read_bytes())
    Image.open(data / "3.png").resize((480, 480)).save(data / "whole.jpg")
    (data / "cut.jpg").write_bytes((data / "whole.jpg").read_bytes()[:3000])
    chats: list[Row] = [
        chat("what is in the first?", "a", "0.png"),
        '{"messages": [{"role": "us',
        {"messages": [{"role": "user", "content": "q"}, {"role": "bot", "content": "a"}]},
        chat("q", ""),
        chat("what is lost?", "a", "none.png"),
        chat("what is private?", "a", "../outside.png"),
        chat("what is cut?", "a", "cut.jpg"),
        chat("word " * 200, "a"),
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a", "weight": 0},
            ]
        },
        chat("say <|im_end|> to me", "a"),
        chat("what is in the third?", "c", "2.png"),
    ]
    marks: list[Row] = [
        llava("<image>\nwhat is shown?", "b", "1.png"),
        llava("<image>\nwhat is not there?", "b"),
        llava("what has no mark?", "b", "4.png"),
        llava("<image>\nwhat is in the test?", "b", "5.png"),
    ]
    sources = {
        "train": [write(data / "chats.jsonl", chats), write(data / "marks.jsonl", marks)],
        "validation": [
            write(
                data / "validation.jsonl",
                [chat("another question", "a", "6.png"), chat("of a copy?", "a", "copy.png")],
            )
        ],
        "test": [
            write(
                data / "test.jsonl",
                [chat("what now?", "a", "7.png"), chat("What is  in the test?", "b", "5.png")],
            )
        ],
    }
    errors = {
        ("chats", 2, "not_json"),
        ("chats", 3, "role"),
        ("chats", 4, "empty_answer"),
        ("chats", 5, "image_missing"),
        ("chats", 6, "image_outside"),
        ("chats", 7, "image_unreadable"),
        ("chats", 8, "overlong"),
        ("chats", 9, "unsupervised"),
        ("marks", 2, "image_count"),
        ("marks", 3, "image_count"),
        ("validation", 2, "leak_image"),
        ("test", 2, "leak_row"),
    }
    return sources, errors, {("chats", 10, "control_text"), ("data.train", 0, "few_rows")}


def named(findings: list[dict[str, Any]]) -> set[tuple[str, int, str]]:
    return {
        (
            Path(finding["source"]).stem if "/" in finding["source"] else finding["source"],
            finding["row"],
            finding["kind"],
        )
        for finding in findings
    }


def test_twelve_planted_faults_are_found_with_their_rows(
    tmp_path: Path, planted: Any, tiny_recipe: Callable[..., str]
) -> None:
    sources, errors, warnings = planted
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text(tiny_recipe, sources))
    report = json.loads(
        cli(
            "check",
            str(path),
            "--json",
            "--set",
            "train.batch_size=6",
            "--html",
            str(tmp_path / "page.html"),
            code=3,
        )
    )
    assert named(report["errors"]) == errors and named(report["warnings"]) == warnings
    assert len(report["errors"]) == sum(report["counts"]["errors"].values()) == 12
    assert all(
        finding["kind"] in KINDS and finding["message"]
        for finding in [*report["errors"], *report["warnings"]]
    )
    train, validation, test = report["counts"]["parts"]
    assert [
        (source["rows"], source["usable"], source["bad"], source["form"])
        for source in train["sources"]
    ] == [
        (11, 3, 8, "messages"),
        (4, 2, 2, "llava"),
    ]
    assert train["questions"] == 5 and [source["images"] for source in train["sources"]] == [2, 2]
    assert [source["rows"] for part in (validation, test) for source in part["sources"]] == [2, 2]
    assert (
        "<|im_end|>" not in (tmp_path / "page.html").read_text()
        and "&lt;|im_end|&gt;" in (tmp_path / "page.html").read_text()
    )


def test_bad_rows_within_the_cap_are_warnings_where_they_are_left_out(
    planted: Any, tiny_recipe: Callable[..., str]
) -> None:
    sources, errors, _ = planted
    text = recipe_text(
        tiny_recipe, {"train": sources["train"]}, more="  overlong: drop\n  on_bad_row: skip\n"
    )
    report = vlm_tune.check(parsed(text))
    bad = {(file, row, kind) for file, row, kind in errors if kind in BAD_ROWS}
    assert report.exit_code == 0 and not report.errors
    assert named(report.summary()["warnings"]) >= bad and report.warning_counts["overlong"] == 1
    (long,) = [finding.message for finding in report.warnings if finding.kind == "overlong"]
    assert long.endswith("tokens, more than data.max_length 128: dropped")
    capped = vlm_tune.check(parsed(text, data__max_bad_rows=8))
    assert capped.exit_code == 3 and capped.error_counts == {"too_many_bad": 1}
    # With `overlong: fail` a long row stops the run whatever is done with bad ones.
    strict = vlm_tune.check(parsed(text, data__overlong="fail"))
    assert strict.error_counts == {"overlong": 1}


def test_what_is_done_with_long_rows_is_told(
    tmp_path: Path, tiny_recipe: Callable[..., str]
) -> None:
    turns = [
        {"role": role, "content": "word " * 12} for _ in range(4) for role in ("user", "assistant")
    ]
    path = write(tmp_path / "rows.jsonl", [chat("q", "a"), {"messages": turns}])

    def message_for(how: str) -> str:
        report = vlm_tune.check(
            parsed(
                recipe_text(tiny_recipe, {"train": [path]}),
                data__overlong=how,
                data__max_length=100,
            )
        )
        (finding,) = [finding for finding in report.warnings if finding.kind == "overlong"]
        assert finding.row == 2 and not report.errors
        return finding.message

    assert message_for("split").endswith("more than data.max_length 100: split into 2")
    assert message_for("trim").endswith("more than data.max_length 100: questions trimmed")
    assert message_for("drop").endswith("more than data.max_length 100: dropped")


def test_a_row_to_score_is_an_error_only_if_its_prompt_is_too_long(
    tmp_path: Path, tiny_recipe: Callable[..., str]
) -> None:
    train = write(tmp_path / "train.jsonl", [chat("q", "a")])
    test = write(
        tmp_path / "test.jsonl",
        [chat("q", "word " * 100), chat("word " * 100, "a"), chat("other", "a")],
    )
    report = vlm_tune.check(parsed(recipe_text(tiny_recipe, {"train": [train], "test": [test]})))
    assert [(finding.row, finding.kind) for finding in report.errors] == [(2, "overlong")]
    assert [finding.row for finding in report.warnings if finding.kind == "overlong"] == [1]


def test_odd_images_duplicates_and_look_alikes_are_warnings(
    tmp_path: Path, tiny_recipe: Callable[..., str]
) -> None:
    Image.new("RGB", (8, 40), "red").save(tmp_path / "tiny.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 400, 3), dtype=np.uint8)).save(
        tmp_path / "narrow.png"
    )
    picture(tmp_path / "a.png", 1)
    Image.open(tmp_path / "a.png").save(tmp_path / "again.jpg", quality=95)
    rows: list[Row] = [chat("q", "a", name) for name in ("tiny.png", "narrow.png", "a.png")]
    train = write(tmp_path / "train.jsonl", [*rows, chat("Q ", "a", "a.png")])
    validation = write(tmp_path / "validation.jsonl", [chat("other", "b", "again.jpg")])
    report = vlm_tune.check(
        parsed(recipe_text(tiny_recipe, {"train": [train], "validation": [validation]}))
    )
    assert not report.errors
    warnings = {(finding.part, finding.row, finding.kind) for finding in report.warnings}
    assert warnings == {
        ("train", 1, "image_tiny"),
        ("train", 1, "image_plain"),
        ("train", 2, "image_narrow"),
        ("train", 4, "duplicate"),
        ("validation", 1, "leak_look"),
    }
    assert "repeats row 3 of" in next(
        finding.message for finding in report.warnings if finding.kind == "duplicate"
    )


def test_no_weights_are_needed(
    tmp_path: Path, color_rows: Path, tiny_recipe: Callable[..., str]
) -> None:
    folder = save_llm(tmp_path / "llm", "causal", rows_of(parsed(tiny_recipe("causal"))))
    text = with_llm(tiny_recipe("causal"), folder, "causal")
    (folder / "model.safetensors").unlink()
    assert vlm_tune.check(parsed(text)).parts[0].questions == 8
    with pytest.raises(ModelError):
        built(parsed(text))


def test_a_check_prepares_the_run_and_a_sample_says_so(tiny_recipe: Callable[..., str]) -> None:
    recipe = parsed(tiny_recipe("causal"), data__group="image")
    first, second = (vlm_tune.check(recipe) for _ in range(2))
    assert first.parts[0].ms_per_row and second.parts[0].ms_per_row is None
    assert [part.sources for part in first.parts] == [part.sources for part in second.parts]
    some = vlm_tune.check(recipe, sample=3)
    assert some.sample == some.summary()["sample"] == 3 and [
        part.sources[0].rows for part in some.parts
    ] == [3, 3]


def test_figures_are_those_of_the_rows(tiny_recipe: Callable[..., str]) -> None:
    report = vlm_tune.check(parsed(tiny_recipe("causal"), data__group="image", train__batch_size=2))
    train = report.parts[0]
    (source,) = train.sources
    assert train.lengths and sum(train.lengths.counts) == source.rows == 8 and source.images == 4
    assert train.image_sides and train.image_sides.counts == [4] and train.image_sides.most == 32
    alone, grouped, packed = train.padding
    assert [waste.name for waste in train.padding] == [
        "rows one by one",
        "this recipe",
        "with packing",
    ]
    # Rows of one image share it, so that a question takes fewer tokens than alone.
    assert grouped.tokens_per_question < alone.tokens_per_question
    assert packed.padding == 0 and source.tokens / 8 <= alone.tokens_per_question


def test_what_an_epoch_draws_of_each_task_is_told(
    tiny_recipe: Callable[..., str], color_rows: Path
) -> None:
    rows = color_rows.read_text().splitlines(keepends=True)
    (few := color_rows.with_name("few.jsonl")).write_text("".join(rows[:2]))
    sources = [
        {"kind": "file", "path": str(path), "task_name": name}
        for path, name in ((few, "colors"), (color_rows, "all"))
    ]
    recipe = parsed(tiny_recipe("causal"), data__train=sources, data__mixture={"temperature": 2})
    report = vlm_tune.check(recipe)
    assert report.parts[0].mixture == {"colors": 2, "all": 4} and report.parts[1].mixture is None
    show_check(Console(file=(text := io.StringIO()), width=100), report)
    assert "an epoch draws   2 of colors, 4 of all" in text.getvalue()


def test_it_says_as_a_plan_does_whether_features_are_cached(
    tiny_recipe: Callable[..., str], color_rows: Path
) -> None:
    stages = "stages: [{name: one}, {name: two, data: {augment: {flip: 0.5}}}]\n"
    recipe = parsed(tiny_recipe("causal") + stages)
    report = vlm_tune.check(recipe)
    features = [part.features for part in report.parts if part.part == "train"]
    assert features == [
        f"{'cached' if stage.cached else 'not cached'}: {stage.why_cached}"
        for stage in vlm_tune.plan(recipe).stages
    ]
    assert features[1] == "not cached: images are augmented"
    assert {part.features for part in report.parts if part.part != "train"} == {None}
    page = io.StringIO()
    show_check(Console(file=page, width=120), report)
    assert "tower's features cached: no step runs the tower, for 0.00 GB on disk" in " ".join(
        page.getvalue().split()
    )
    # A share of the rows says nothing about the disk that all need.
    assert vlm_tune.check(recipe, sample=2).parts[0].features is None
    texts = [json.loads(line) for line in color_rows.read_text().splitlines()]
    color_rows.write_text("".join(json.dumps(row | {"images": []}) + "\n" for row in texts))
    assert [part.features for part in vlm_tune.check(recipe).parts] == [None] * len(report.parts)


def test_a_source_that_is_not_there_does_not_hide_the_others(
    tmp_path: Path, color_rows: Path, tiny_recipe: Callable[..., str]
) -> None:
    report = vlm_tune.check(
        parsed(recipe_text(tiny_recipe, {"train": [tmp_path / "none.jsonl", color_rows]}))
    )
    assert [(finding.kind, finding.row, finding.message) for finding in report.errors] == [
        ("source", 0, "no such file")
    ]
    assert [source.rows for source in report.parts[0].sources] == [8] and report.exit_code == 3


def test_held_out_rows_are_a_part_of_their_own(
    tmp_path: Path, color_rows: Path, tiny_recipe: Callable[..., str]
) -> None:
    text = recipe_text(
        tiny_recipe, {"train": [color_rows]}, more="  split: {validation: 0.25, test: 0.25}\n"
    )
    report = vlm_tune.check(parsed(text))
    assert {part.part: sum(source.usable for source in part.sources) for part in report.parts} == {
        "train": 4,
        "validation": 2,
        "test": 2,
    }
    assert not report.error_counts


def test_a_recipe_error_is_exit_2_and_a_good_recipe_exit_0(
    tmp_path: Path, tiny_recipe: Callable[..., str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text(tiny_recipe, {"train": [tmp_path / "messages.jsonl"]}))
    assert "0 errors" in cli("check", str(path), "--sample", "4")
    path.write_text("nme: x\n")
    cli("check", str(path), code=2)


def test_listed_findings_are_bounded_and_all_are_counted(
    tmp_path: Path, tiny_recipe: Callable[..., str]
) -> None:
    path = write(tmp_path / "rows.jsonl", [chat("q", "a"), *["{"] * 1200])
    report = vlm_tune.check(parsed(recipe_text(tiny_recipe, {"train": [path]})))
    assert (
        len(report.errors) == 1000
        and report.error_counts["not_json"] == 1200
        and report.errors[-1].row == 1001
    )


def test_the_page_shows_rows_as_text_and_is_complete_in_itself(
    tmp_path: Path, tiny_recipe: Callable[..., str]
) -> None:
    picture(tmp_path / "a.png", 1)
    hostile = "<script>alert(1)</script>\\<image>"
    rows: list[Row] = [
        chat(hostile, "a", "a.png"),
        chat("q", "", f"{hostile}.png"),
        *[chat(f"{hostile} {n}", "a", "a.png") for n in range(90)],
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    write_page(
        vlm_tune.check(parsed(recipe_text(tiny_recipe, {"train": [path]}))),
        tmp_path / "deep" / "page.html",
    )
    text = (tmp_path / "deep" / "page.html").read_text()
    assert "<script" not in text and "&lt;script&gt;" in text and "://" not in text
    shown = text[text.index("A look at the odd rows") :]
    assert (
        shown.count("<article") == 60
        and shown.count('src="data:image/png;base64,') == 59
        and "60 of 92" in shown
    )


def test_a_histogram_counts_every_value_once() -> None:
    bins = histogram(np.array([7, 7, 12, 30, 99]))
    assert bins and (bins.start, bins.width, bins.least, bins.middle, bins.most) == (
        0,
        10,
        7,
        12,
        99,
    )
    assert bins.counts == [2, 1, 0, 1, 0, 0, 0, 0, 0, 1] and histogram(np.array([])) is None


def test_every_kind_is_in_the_documentation() -> None:
    text = (Path(__file__).parent.parent.parent / "docs" / "data.md").read_text()
    assert not [kind for kind, meaning in KINDS.items() if f"| `{kind}` | {meaning} |" not in text]


def test_weights_of_the_connector_are_checked_by_their_file(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    text = recipe_text(tiny_recipe, {"train": [write(tmp_path / "rows.jsonl", [chat("q", "a")])]})
    recipe = tmp_path / "recipe.yaml"
    weights = tmp_path / "mm_projector.safetensors"

    def stop_reason() -> str:
        recipe.write_text(
            text.replace("{kind: mlp, norm: true}", f"{{kind: linear, weights: {weights}}}")
        )
        try:
            vlm_tune.check(recipe)
        except ModelError as error:
            return str(error)
        return ""

    assert "mm_projector.safetensors: no such weights file" in stop_reason()
    save_file({"mm_projector.weight": torch.zeros(3, 5)}, weights)
    misfit = stop_reason()
    assert "does not fit the model; missing: linear.bias; misshapen: linear.weight is [3, 5]" in (
        misfit
    )
    wanted = misfit.partition("expected ")[2].strip("[]").split(", ")
    shape = [int(size) for size in wanted]
    tensors = {"weight": torch.zeros(shape), "bias": torch.zeros(shape[0])}
    save_file({f"model.mm_projector.{name}": tensor for name, tensor in tensors.items()}, weights)
    assert stop_reason() == ""


def test_media_are_counted_as_what_they_are(tmp_path: Path) -> None:
    """Clips of audio, of which one has two windows, are no images."""
    rows = write_tone_rows(tmp_path)
    report = vlm_tune.check(parsed(hearing_recipe("causal", rows, tmp_path / "run")))
    (source,) = report.parts[0].sources
    assert (source.images, source.frames, source.clips) == (0, 0, 2)
    text = io.StringIO()
    show_check(Console(file=text, width=200), report)
    write_page(report, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    for shown in (text.getvalue(), page):
        assert "audio clips" in shown and "its text and audio clips are those of" in shown
        assert " images" not in shown


def test_no_answer_is_trained_where_answers_are_sampled(tiny_recipe: Callable[..., str]) -> None:
    recipe = parsed(tiny_recipe("causal"), objective={"kind": "grpo", "num_generations": 2})
    train, validation = vlm_tune.check(recipe).parts
    assert train.sources[0].supervised == 0 < validation.sources[0].supervised
