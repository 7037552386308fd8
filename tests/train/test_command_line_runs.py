"""The whole way through the command line: train, score, merge, ask; and the same from Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.tiny_models import cli
from vlm_tune import VisionLanguageModel

STAGES = """
stages:
  - name: base
    data: {{train: [{{kind: file, path: {wrong}}}]}}
    train: {{steps: 80}}
  - name: instruct
    tune:
      - {{match: "tower.*", how: frozen}}
      - {{match: "connector.*", how: full}}
      - {{match: "llm.*", how: lora, r: 16, lora_alpha: 32, target_modules: all-linear, \
learning_rate: 1.0e-2}}
"""
"""A base that learns wrong answers, which only LoRA can then put right."""
STEPS = {"seq2seq": 120, "causal": 100}


def long_enough(text: str, kind: str, *, learning_rate: float = 5e-3) -> str:
    """The tiny recipe with enough steps to learn the eight rows by heart."""
    train = (
        f"train: {{steps: {STEPS[kind]}, batch_size: 8, learning_rate: {learning_rate}, "
        f"precision: fp32, schedule: {{warmup: 0.1}},"
    )
    train += " checkpoints: {every: 1000}}"  # not after each epoch, which is a step
    lines = [train if line.startswith("train:") else line for line in text.splitlines()]
    lines = [
        "evaluate: {every: 1000, max_new_tokens: 6, samples: 2}"
        if line.startswith("evaluate:")
        else line
        for line in lines
    ]
    return "\n".join(lines) + "\n"


def ask_all(model: VisionLanguageModel, folder: Path) -> None:
    """Every question about every image is answered rightly, one by one and in one batch."""
    requests = [
        {"prompt": question, "images": [folder / f"{name}.png"]}
        for name in ("red", "green", "blue", "yellow")
        for question in ("what color is it?", f"is it {'red' if name != 'red' else 'blue'}?")
    ]
    expected = [answer for name in ("red", "green", "blue", "yellow") for answer in (name, "no")]
    together = model.chat_batch(requests, max_new_tokens=6)
    assert together == expected
    assert [
        model.chat(request["prompt"], images=request["images"], max_new_tokens=6)
        for request in requests
    ] == together
    assert model.chat_batch(list(reversed(requests)), max_new_tokens=6, batch_size=3) == list(
        reversed(together)
    )
    with Image.open(folder / "blue.png") as image:
        assert model.chat("what color is it?", images=[image]) == "blue"
    assert (
        model.chat(
            [{"role": "user", "content": "what color is it?"}],
            images=[(folder / "green.png").read_bytes()],
        )
        == "green"
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_full_training_learns_the_rows_by_heart(
    kind: str, tiny_recipe: Callable[..., str], color_rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(long_enough(tiny_recipe(kind), kind))
    done = json.loads(cli("sft", str(tmp_path / "recipe.yaml"), "--json").splitlines()[-1])
    assert Path(done["run"]) == tmp_path / "run"
    scores = json.loads(
        cli("eval", str(tmp_path / "run"), "--split", "validation", "--json").splitlines()[-1]
    )
    assert (scores["accuracy"], scores["n"]) == (1.0, 8)
    ask_all(VisionLanguageModel.from_pretrained(tmp_path / "run"), tmp_path)
    checkpoint = sorted((tmp_path / "run").glob("stages/*/checkpoints/step-*"))[-1]
    ask_all(VisionLanguageModel.from_pretrained(checkpoint), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_lora_learns_merges_and_chats(
    kind: str, tiny_recipe: Callable[..., str], color_rows: Path, tmp_path: Path
) -> None:
    wrong = (
        color_rows.read_text()
        .replace('"content": "red"', '"content": "none"')
        .replace('"content": "blue"', '"content": "red"')
    )
    (tmp_path / "wrong.jsonl").write_text(wrong.replace('"content": "no"', '"content": "yes"'))
    text = long_enough(tiny_recipe(kind), kind) + STAGES.format(wrong=tmp_path / "wrong.jsonl")
    test = f"  test: [{{kind: file, path: {color_rows}}}]\n  template:"
    (tmp_path / "recipe.yaml").write_text(text.replace("  template:", test))
    done = json.loads(cli("sft", str(tmp_path / "recipe.yaml"), "--json").splitlines()[-1])
    assert (done["accuracy"], done["n"]) == (1.0, 8)
    merged = tmp_path / "merged"
    report = json.loads(
        cli("merge", str(tmp_path / "run"), "--output", str(merged), "--json").splitlines()[-1]
    )
    assert report["same_text"]
    for name in ("red", "yellow"):
        answer = cli(
            "chat",
            str(merged),
            "--image",
            str(tmp_path / f"{name}.png"),
            "--prompt",
            "what color is it?",
        )
        assert answer.strip().splitlines()[-1] == name
    scores = json.loads(
        cli("eval", str(merged), "--recipe", str(tmp_path / "recipe.yaml"), "--json").splitlines()[
            -1
        ]
    )
    assert scores["accuracy"] == 1.0
    checkpoint = sorted((tmp_path / "run").glob("stages/*/checkpoints/step-*"))[-1]
    for folder in (tmp_path / "run", checkpoint, merged):
        ask_all(VisionLanguageModel.from_pretrained(folder), tmp_path)
    cli("merge", str(tmp_path / "run"), "--output", str(merged), code=4)
