"""Models trained on rows with reasoning: scored by the answer alone, asked, served, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.native_models import save_native, with_native
from tests.helpers.served import chat, events_of, served, with_images
from tests.helpers.tiny_models import built, cli, parsed, png, rows_of
from tests.helpers.tiny_recipes import tiny_text
from vlm_tune import VisionLanguageModel, export
from vlm_tune.api import sft
from vlm_tune.config.recipe import Recipe
from vlm_tune.evaluation.evaluate import score
from vlm_tune.generation.requests import request_conversation
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.serving.engine import BatchingEngine

pytestmark = pytest.mark.slow
REASON = "It looks red."
WRITTEN = f"<think>\n{REASON}\n</think>\n\nyes"
KINDS = ("native", "composed")


def write_rows(folder: Path, *, inline: bool) -> Path:
    """Rows about one image, all with one answer, its reasoning in a field or in the text."""
    (folder / "red.png").write_bytes(png().read())
    answer = {"content": WRITTEN} if inline else {"content": "yes", "reasoning_content": REASON}
    rows = [
        {
            "images": ["red.png"],
            "messages": [
                {"role": "user", "content": f"Is it red, number {number}?"},
                {"role": "assistant", **answer},
            ],
        }
        for number in range(20)
    ]
    for name, of_part in (("rows", rows[:16]), ("test", rows[16:])):
        lines = "".join(json.dumps(row) + "\n" for row in of_part)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder / "rows.jsonl"


def recipe_text(kind: str, folder: Path) -> str:
    rows = write_rows(folder, inline=kind == "composed")
    text = tiny_text("causal", rows, folder / "run")
    test = f"  test: [{{kind: file, path: {folder / 'test.jsonl'}}}]\n"
    text = text.replace("  template:", f"{test}  template:")
    if kind == "composed":
        return text.replace("template: chatml", "template: qwen3")
    save_native(folder / "vlm", "qwen3_5")
    text = with_native(text, folder / "vlm")
    return text.replace("template: own", "template: own\n  enable_thinking: true")


def recipe_of(kind: str, folder: Path) -> Recipe:
    text = recipe_text(kind, folder).replace('  - {match: "tower.*", how: frozen}\n', "")
    (folder / "recipe.yaml").write_text(text)
    return parsed(
        text,
        train__steps=60,
        train__batch_size=8,
        train__learning_rate=1e-2,
        evaluate__max_new_tokens=48,
    )


@pytest.fixture(scope="module", params=KINDS)
def trained(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp(request.param)
    sft(recipe_of(request.param, folder))
    return folder


def test_the_answer_alone_is_scored(trained: Path) -> None:
    model = VisionLanguageModel.from_pretrained(trained / "run")
    rows = rows_of(parsed((trained / "recipe.yaml").read_text()))[:4]
    scores = score(model, rows, decoding=Decoding(48))
    assert scores.accuracy == 1.0
    assert {(answer.expected, answer.generated) for answer in scores.answers} == {("yes", "yes")}
    # Tokens of the loss are those of reasoning and answer.
    assert scores.loss is not None and scores.loss < 0.5
    assert scores.tokens > 4 * len(REASON.split())


def test_baselines_answer_without_reasoning_too(trained: Path) -> None:
    """Where it is part of the rows' texts, the most frequent answer is not the text with it."""
    result = json.loads((trained / "run" / "result.json").read_text())
    assert result["baselines"]["majority"]["exact_match"]["value"] == 1.0


def test_the_mask_shows_reasoning_and_answer(trained: Path) -> None:
    shown = json.loads(cli("show", str(trained / "recipe.yaml"), "-n", "1", "--json"))
    tokens = [token for token in shown[0]["tokens"] if token["kind"] == "trained"]
    learned = "".join(token["text"] for token in tokens)
    # The native model's prompt ends with the opening mark, the other one writes it.
    assert WRITTEN.removeprefix("<think>\n") in learned
    assert learned.startswith("<think>") == ("composed" in trained.name)


def test_reasoning_comes_apart_from_the_answer(trained: Path) -> None:
    model = VisionLanguageModel.from_pretrained(trained / "run")
    question = "Is it red, number 3?"
    answer = model.answer(question, png(), max_new_tokens=48)
    assert (answer.text, answer.reasoning) == ("yes", REASON)
    assert "".join(model.stream(question, png(), max_new_tokens=48)) == "yes"
    # The tokens of both count.
    short = model.answer(question, png(), max_new_tokens=6)
    assert short.text == "" and short.reasoning and REASON.startswith(short.reasoning)
    without = model.answer(question, png(), max_new_tokens=48, enable_thinking=False)
    assert without.reasoning is None
    schema = {"enum": ["yes", "no"]}
    answer = model.answer(question, png(), max_new_tokens=48, json_schema=schema)
    assert (answer.text, answer.reasoning) == ('"yes"', REASON)
    session = model.start_chat(max_new_tokens=48)
    session.ask(question, png())
    session.ask("Is it red, number 4?")
    assert [turn.get("reasoning_content") for turn in session.messages][1] == REASON
    # Earlier reasoning is no part of a later prompt.
    row = request_conversation(1, {"messages": [*session.messages[:3]]})
    assert REASON not in model.processor.raw_text(
        model.processor.prompt(row).input_ids[~model.processor.prompt(row).image_mask].tolist()
    )


def test_a_server_gives_reasoning_content(trained: Path) -> None:
    model = VisionLanguageModel.from_pretrained(trained / "run")
    engine = BatchingEngine({"tiny": model}, queue=4, batch=2)
    server = served(model, engine)
    image = png().read()
    body = with_images(image, max_tokens=48)
    body["messages"][0]["content"][-1]["text"] = "Is it red, number 3?"
    (choice,) = chat(server, body).json()["choices"]
    assert choice["message"]["content"] == "yes"
    assert choice["message"]["reasoning_content"] == REASON
    deltas = [
        event["choices"][0]["delta"]
        for event in events_of(chat(server, {**body, "stream": True}).text)[:-1]
        if event["choices"]
    ]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == REASON
    assert "".join(delta.get("content", "") for delta in deltas) == "yes"
    assert deltas[0]["role"] == "assistant" and "content" not in deltas[0]
    off: dict[str, Any]
    for off in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        (choice,) = chat(server, {**body, **off}).json()["choices"]
        assert choice["message"]["reasoning_content"] is None
    again = {"role": "assistant", "content": "yes", "reasoning_content": REASON}
    question = {"role": "user", "content": "Is it red, number 4?"}
    reply = chat(server, {**body, "messages": [*body["messages"], again, question]})
    assert reply.status_code == 200
    engine.close(10)


def test_the_answers_of_predict_have_their_reasoning_beside_them(trained: Path) -> None:
    output = trained / "answers.jsonl"
    cli("predict", str(trained / "run"), "--data", str(trained / "rows.jsonl"),
        "--output", str(output), "--max-new-tokens", "48")  # fmt: skip
    line = json.loads(output.read_text().splitlines()[0])
    assert (line["expected"], line["answer"], line["reasoning_content"]) == ("yes", "yes", REASON)


@pytest.mark.parametrize("trained", ["native"], indirect=True)
def test_an_export_writes_reasoning_as_it_was_trained(trained: Path) -> None:
    report = export(trained / "run", trained / "out", dtype="fp32")
    assert report.same_text and report.difference is not None and report.difference <= 1e-4
    again = parsed(
        recipe_text("native", trained).replace(str(trained / "vlm"), str(trained / "out"))
    )
    # The mode is the recipe's, whatever mode a start was saved in.
    assert built(again).processor.template.enable_thinking is True
    off = again.model_copy(update={"data": again.data.model_copy(update={"enable_thinking": None})})
    assert built(off).processor.template.reasoning is None
