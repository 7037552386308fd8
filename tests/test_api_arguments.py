"""Arguments of the wrong kind to every public function.

An error of ours that says what was expected, or success.
"""

from __future__ import annotations

import inspect
import socket
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import vlm_tune
from tests.helpers.tiny_recipes import tiny_text, write_color_rows
from vlm_tune.errors import VlmTuneError
from vlm_tune.model.language.decoding import Decoding

ODD: tuple[Any, ...] = (-7, float("nan"), "a\0b", b"x", [None], {1: 2}, object())
"""What is given in place of an argument."""

UNCHECKED = {"self", "cls", "show", "started"}
"""Parameters that are no data: `show` and `started` are the caller's own functions."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows, a recipe, its run and the merged model."""
    place = tmp_path_factory.mktemp("arguments")
    rows = write_color_rows(place)
    (place / "recipe.yaml").write_text(tiny_text("causal", rows, place / "run", "fp32"))
    vlm_tune.sft(place / "recipe.yaml", ["train.steps=1", "evaluate.samples=0"], test=False)
    return place


def calls(folder: Path, taken: int) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Public functions with arguments that work; `serve` ends at a port that is `taken`."""
    model = vlm_tune.VisionLanguageModel
    vlm = model.from_pretrained(folder / "run")
    recipe, run = folder / "recipe.yaml", folder / "run"
    return {
        "sft": (
            vlm_tune.sft,
            {"recipe": recipe, "overrides": ["train.steps=1"], "overwrite": True, "test": False},
        ),
        # The recipe is not theirs, which comes after what is wrong with an argument.
        "dpo": (vlm_tune.dpo, {"recipe": recipe, "overrides": ["train.steps=1"]}),
        "kto": (vlm_tune.kto, {"recipe": recipe, "overrides": ["train.steps=1"]}),
        "grpo": (vlm_tune.grpo, {"recipe": recipe, "overrides": ["train.steps=1"]}),
        "sweep": (
            vlm_tune.sweep,
            # This folder is not empty, which comes after what is wrong with an argument.
            {"recipe": recipe, "search": {"seed": "1..2"}, "trials": 1, "output": folder},
        ),
        "serve": (vlm_tune.serve, {"model": run, "port": taken}),
        "check": (vlm_tune.check, {"recipe": recipe}),
        "plan": (vlm_tune.plan, {"recipe": recipe}),
        "init": (
            vlm_tune.init,
            {"paths": folder / "messages.jsonl", "output": folder / "new.yaml", "force": True},
        ),
        "load_recipe": (vlm_tune.load_recipe, {"path": recipe}),
        "evaluate": (
            vlm_tune.evaluate,
            {"model": run, "data": folder / "messages.jsonl", "limit": 1},
        ),
        "report": (vlm_tune.report, {"runs": [run, run], "output": folder / "page.html"}),
        "compare": (
            vlm_tune.compare,
            {"first": run, "second": run, "data": folder / "messages.jsonl", "limit": 1},
        ),
        "predict": (
            vlm_tune.predict,
            {
                "model": run,
                "data": folder / "messages.jsonl",
                "output": folder / "answers.jsonl",
                "limit": 1,
                "max_new_tokens": 1,
            },
        ),
        "verify_run": (vlm_tune.verify_run, {"run": run}),
        "merge": (vlm_tune.merge, {"model": run, "output": folder / "merged"}),
        "export": (vlm_tune.export, {"model": run, "output": folder / "exported"}),
        "from_pretrained": (model.from_pretrained, {"path": run}),
        "save_pretrained": (vlm.save_pretrained, {"path": folder / "saved"}),
        "chat": (
            vlm.chat,
            {"prompt": "what color?", "images": folder / "red.png", "max_new_tokens": 1},
        ),
        "chat_batch": (vlm.chat_batch, {"requests": ["what color?"], "max_new_tokens": 1}),
        "answer_batch": (vlm.answer_batch, {"requests": ["what color?"], "max_new_tokens": 1}),
        "embed_images": (vlm.embed_images, {"images": [folder / "red.png"]}),
        "embed_texts": (vlm.embed_texts, {"texts": ["red"]}),
        "stream": (
            lambda **arguments: list(vlm.stream(**arguments)),
            {"prompt": "what color?", "images": folder / "red.png", "max_new_tokens": 1},
        ),
    }


def parameters(function: Callable[..., Any]) -> dict[str, str]:
    """The parameters of a function and their annotations, with the settings of generation."""
    named = inspect.signature(function).parameters.values()
    annotations = {
        each.name: str(each.annotation)
        for each in named
        if each.name not in ("arguments", "options")
    }
    if annotations.pop("settings", None) or not annotations:
        annotations |= {field.name: str(field.type) for field in fields(Decoding)}
    return annotations


@pytest.mark.slow
def test_every_public_function_names_an_argument_that_can_not_be_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(folder)
    taken = socket.create_server(("127.0.0.1", 0))
    request.addfinalizer(taken.close)
    table = calls(folder, taken.getsockname()[1])
    public = {name for name in vlm_tune.__all__ if inspect.isfunction(getattr(vlm_tune, name))}
    assert public <= table.keys()
    wrong = []
    refused = 0
    for name, (function, arguments) in table.items():
        for parameter, annotation in parameters(function).items():
            if parameter in UNCHECKED or annotation.startswith("bool"):
                continue
            for value in ODD:
                try:
                    function(**arguments | {parameter: value})
                except VlmTuneError as error:
                    refused += 1
                    if len(str(error)) < 10 or len(max(str(error).splitlines(), key=len)) > 600:
                        wrong.append(f"{name}({parameter}={value!r}): {error}")
                except Exception as error:
                    wrong.append(f"{name}({parameter}={value!r}): {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)
    assert refused > 200


def test_a_damaged_image_of_a_request_is_named(folder: Path) -> None:
    vlm = vlm_tune.VisionLanguageModel.from_pretrained(folder / "run")
    good = (folder / "red.png").read_bytes()
    with pytest.raises(VlmTuneError, match="request 2: image 2: not an image"):
        vlm.chat_batch(
            ["hello", {"prompt": "what <image> and <image>?", "images": [good, b"x"]}],
            max_new_tokens=1,
        )
