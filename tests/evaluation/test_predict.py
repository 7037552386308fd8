"""Answers to files of rows, and scores on them.

What a path of a model means; arguments of another kind.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import vlm_tune
from tests.helpers.tiny_models import built, cli, parsed
from tests.helpers.tiny_recipes import tiny_text, write_color_rows
from vlm_tune.cli.options import read_schema
from vlm_tune.data.sources.registry import read_path
from vlm_tune.errors import ArgumentError, DataError, RecipeError, VlmTuneError
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.checkpoint import save_model
from vlm_tune.saved_models import which_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the rows of colors and, in `model`, an untrained model for them."""
    folder = tmp_path_factory.mktemp("predict")
    text = tiny_text("causal", write_color_rows(folder), folder / "run")
    save_model(built(parsed(text)), folder / "model")
    return folder


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


USER = {"role": "user", "content": "what color is it?"}
ANSWER = {"role": "assistant", "content": "red"}


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"image": "red.png", "question": "what color?"}, "what color?"),
        ({"image": "red.png", "question": "what color?", "answer": ""}, "what color?"),
        ({"messages": [USER], "images": ["red.png"]}, "what color is it?"),
        ({"messages": [USER, ANSWER, USER], "images": ["red.png"]}, "what color is it?"),
        (
            {"conversations": [{"from": "human", "value": "<image>\nwhat?"}], "image": "red.png"},
            "what?",
        ),
        ({"prompt": "what?", "image": "red.png"}, "what?"),
        ({"instruction": "what?", "images": ["red.png"]}, "what?"),
        ({"texts": [{"user": "what?"}], "images": ["red.png"]}, "what?"),
        ({"image": "red.png", "question": "which?", "choices": ["red", "blue"]}, "which?"),
        ({"image": "red.png", "choices": ["red", "blue"]}, "red"),
        ({"image": "red.png", "candidates": ["a red one", "a blue one"]}, "a blue one"),
        ({"image": "red.png", "target_language": "German", "text": "stop"}, "German"),
        ({"image": "red.png"}, ""),
    ],
)
def test_rows_of_every_form_may_lack_their_answer(
    row: dict[str, Any], question: str, folder: Path
) -> None:
    path = write(folder / "asked.jsonl", row)
    rows, unanswered = read_path(str(path), seed=0, unanswered=True)
    assert len(rows) == 1 and unanswered == {(rows[0].source, 1)}
    assert rows[0].media and question in [m.text for m in rows[0].messages if m.role == "user"][-1]


def test_answers_are_written_row_by_row_and_known_ones_beside_them(folder: Path) -> None:
    path = write(
        folder / "mixed.jsonl",
        {"messages": [USER], "images": ["red.png"]},
        {"messages": [USER, ANSWER], "images": ["blue.png"]},
        {"messages": [{"role": "user", "content": "hello"}]},
    )
    report = vlm_tune.predict(
        folder / "model", path, folder / "answers.jsonl", batch_size=2, max_new_tokens=4
    )
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert (report.n, report.answered) == (3, 1)
    assert [(line["row"], line["expected"]) for line in lines] == [(1, None), (2, "red"), (3, None)]
    assert [Path(line["image"]).name for line in lines] == ["red.png", "blue.png", ""]
    # The placeholder of a missing answer reaches no model: what is asked is the question alone.
    model = VisionLanguageModel.from_pretrained(folder / "model")
    expected = [
        model.chat(USER["content"], images=[folder / "red.png"], max_new_tokens=4),
        model.chat(USER["content"], images=[folder / "blue.png"], max_new_tokens=4),
        model.chat("hello", max_new_tokens=4),
    ]
    assert [line["answer"] for line in lines] == expected


def test_a_bad_row_stops_before_anything_is_written(folder: Path) -> None:
    path = write(
        folder / "bad.jsonl",
        {"messages": [USER], "images": ["red.png"]},
        {"messages": [USER], "images": ["nope.png"]},
    )
    with pytest.raises(DataError, match=r"bad\.jsonl, row 2"):
        vlm_tune.predict(folder / "model", path, folder / "none.jsonl")
    assert not (folder / "none.jsonl").exists()


def test_a_file_is_scored_as_the_same_rows_of_a_recipe(folder: Path) -> None:
    scores = vlm_tune.evaluate(folder / "model", data=folder / "messages.jsonl", limit=5)
    recipe = parsed(
        tiny_text("causal", folder / "messages.jsonl", folder / "run"), evaluate__max_new_tokens=32
    )
    same = vlm_tune.evaluate(folder / "model", recipe, split="validation", limit=5)
    assert [(a.question, a.expected, a.generated) for a in scores.answers] == [
        (a.question, a.expected, a.generated) for a in same.answers
    ]
    assert scores.n == 5


def test_predict_and_eval_of_the_command_line_say_which_model(folder: Path) -> None:
    path = write(folder / "one.jsonl", {"image": "red.png", "question": "what color?"})
    report = json.loads(
        cli(
            "predict",
            str(folder / "model"),
            "--data",
            str(path),
            "--output",
            str(folder / "out.jsonl"),
            "--device",
            "cpu",
            "--json",
        )
    )
    assert (
        report["n"] == 1
        and report["model"]["folder"] == str(folder / "model")
        and report["output"] == str(folder / "out.jsonl")
    )


def test_a_run_means_its_model_or_its_last_checkpoint(tmp_path: Path) -> None:
    step = tmp_path / "run" / "stages" / "1-main" / "checkpoints" / "step-20"
    step.mkdir(parents=True)
    for name, text in (("config.json", "{}"), ("manifest.json", '{"files": {}}')):
        (step / name).write_text(text)
    last = which_model(tmp_path / "run")
    assert (last["stage"], last["step"]) == ("1-main", 20) and "no finished model yet" in last[
        "about"
    ]
    assert which_model(step)["about"] == "the checkpoint of step 20 of stage 1-main"
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    (step.parent.parent / "done.json").write_text(json.dumps({"step": 40, "best_step": 20}))
    best = which_model(tmp_path / "run")
    assert (
        best["step"] == 20
        and best["about"] == "the finished model: the best checkpoint, step 20, of stage 1-main"
    )


MISUSES = [
    lambda: vlm_tune.sft("nope.yaml"),
    lambda: vlm_tune.sft({"name": "x"}),  # type: ignore[arg-type]
    lambda: vlm_tune.sft(None),  # type: ignore[arg-type]
    lambda: vlm_tune.sft("recipes/demo.yaml", {"train.lr": 1}),
    lambda: vlm_tune.sft("recipes/demo.yaml", "train.epochs=1"),
    lambda: vlm_tune.sft("recipes/demo.yaml", [1]),  # type: ignore[list-item]
    lambda: vlm_tune.sft(vlm_tune.load_recipe("recipes/demo.yaml"), {"train.epochs": 1}),
    lambda: vlm_tune.load_recipe(5),  # type: ignore[arg-type]
    lambda: vlm_tune.check("recipes/demo.yaml", sample=0),
    lambda: vlm_tune.check("recipes/demo.yaml", sample="3"),  # type: ignore[arg-type]
    lambda: vlm_tune.plan("recipes/demo.yaml", gpu_memory="lots"),
    lambda: vlm_tune.plan("recipes/demo.yaml", gpu_memory="inf"),
    lambda: vlm_tune.plan("recipes/demo.yaml", gpu_memory=-1),
    lambda: vlm_tune.plan("recipes/demo.yaml", gpu_memory=[]),  # type: ignore[arg-type]
    lambda: vlm_tune.plan("recipes/demo.yaml", processes=0),
    lambda: vlm_tune.plan("recipes/demo.yaml", zero=7),
    lambda: vlm_tune.plan("recipes/demo.yaml", offload="x"),  # type: ignore[arg-type]
    lambda: vlm_tune.plan("recipes/demo.yaml", tokens=10**9),
    lambda: vlm_tune.evaluate("nope", split="x"),  # type: ignore[arg-type]
    lambda: vlm_tune.evaluate("nope", limit=-1),
    lambda: vlm_tune.evaluate("nope", limit="3"),  # type: ignore[arg-type]
    lambda: vlm_tune.evaluate("nope", dtype="half"),
    lambda: vlm_tune.evaluate(5),  # type: ignore[arg-type]
    lambda: vlm_tune.evaluate("nope", data=["x"]),  # type: ignore[arg-type]
    lambda: vlm_tune.predict("nope", "x.jsonl", "y.jsonl"),
    lambda: vlm_tune.predict("nope", "x.jsonl", "y.jsonl", num_beams=0),
    lambda: vlm_tune.predict("nope", 5, "y.jsonl"),  # type: ignore[arg-type]
    lambda: vlm_tune.merge("nope", "out", dtype="int8"),
    lambda: vlm_tune.merge(None, "out"),  # type: ignore[arg-type]
    lambda: vlm_tune.export("nope", "out", format="x"),
    lambda: vlm_tune.verify_run("nope"),
    lambda: vlm_tune.verify_run("nope", steps=-1),
]


@pytest.mark.parametrize("misuse", MISUSES)
def test_arguments_of_another_kind_are_refused_by_name(misuse: Any) -> None:
    with pytest.raises(VlmTuneError) as caught:
        misuse()
    assert 0 < len(str(caught.value)) < 600
    if isinstance(caught.value, RecipeError):
        assert all(problem.where for problem in caught.value.problems)


def test_answers_follow_a_schema(folder: Path, tmp_path: Path) -> None:
    """A schema in a file is read before the model, and every answer is JSON of it."""
    questions = [{"image": "red.png", "question": question} for question in ("hello", "and now?")]
    rows = write(folder / "schema_rows.jsonl", *questions)
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"enum": [1, 23]}, "minItems": 2, "maxItems": 2}')
    output = tmp_path / "answers.jsonl"
    command = ["predict", str(folder / "model"), "--data", str(rows), "--output", str(output)]
    cli(*command, "--json-schema", str(schema), "--max-new-tokens", "40")
    answers = [json.loads(json.loads(line)["answer"]) for line in output.read_text().splitlines()]
    assert len(answers) == 2 and all(set(answer) <= {1, 23} for answer in answers)
    with pytest.raises(ArgumentError, match=r"json_schema: no answer can follow it: Invalid type"):
        vlm_tune.predict(folder / "model", rows, output, json_schema={"type": "arry"})
    for text, message in (("[1]", "is not a JSON object"), ("{", "can't be read")):
        schema.write_text(text)
        with pytest.raises(RecipeError, match=message):
            read_schema(schema)
