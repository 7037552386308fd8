"""Eight threads that ask one model at once get the answers that they get one by one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.helpers.tiny_models import LORA_TUNE, built, parsed, tuned_by, wake_adapters, with_tune
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.kernels import attention as attention_operator
from vlm_tune.model.acceleration.lora_layers import merge_projections

THREADS = 8
CHATS = 50
SWITCHES = 15

MLP = "{kind: mlp, norm: true}"
CROSS_ATTENTION = (
    "{kind: cross_attention, every: 1, heads: 4, base: {kind: resampler, latents: 3, "
    "depth: 1, heads: 4}}"
)


def images(folder: Path) -> list[Path]:
    """Four images of one color each."""
    paths = []
    for number, color in enumerate(("red", "green", "blue", "white")):
        paths.append(folder / f"{number}.png")
        Image.new("RGB", (16, 16), color).save(paths[-1])
    return paths


def requests(paths: Sequence[Path], thread: int, count: int) -> list[list[dict[str, Any]]]:
    """The chats of one thread: one question, or three about one image, of different lengths."""
    chats = []
    for number in range(count):
        image = paths[(thread + number) % len(paths)]
        texts = [f"what color is it? {'please ' * (number % 5)}{thread}", "is it red?", "shape"]
        asked_at_once = 3 if number % 3 == 0 else 1
        chats.append([{"prompt": text, "images": [image]} for text in texts[:asked_at_once]])
    return chats


def answers(
    model: VisionLanguageModel, chats: Sequence[Sequence[dict[str, Any]]]
) -> list[list[str]]:
    return [model.chat_batch(chat, max_new_tokens=4) for chat in chats]


def ready(text: str) -> VisionLanguageModel:
    """A tuned model of random weights, whose answers differ from one question to the next."""
    recipe = parsed(text)
    model: Any = built(recipe)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    tuned_by(model, recipe)
    wake_adapters(model)
    merge_projections(model)
    return model.to(torch.bfloat16) if recipe.train.precision == "bf16" else model


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("causal", ("hidden_size: 32", "hidden_size: 64, head_dim: 32")),
        ("seq2seq", ("", "")),
        ("causal", (MLP, CROSS_ATTENTION)),
    ],
)
def test_threads_get_the_answers_that_they_get_one_by_one(
    kind: str,
    change: tuple[str, str],
    training: bool,
    kernels: str,
    tiny_recipe: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the kernels on, in eval mode, and in training mode, where chats switch it."""
    text = with_tune(tiny_recipe(kind, precision="bf16"), LORA_TUNE)
    assert change[0] in text
    model = ready(text.replace(*change)).train(training)
    decoded: list[int] = []
    real = attention_operator._decode_by_kernel
    monkeypatch.setattr(
        attention_operator,
        "_decode_by_kernel",
        lambda *given: decoded.append(threading.get_ident()) or real(*given),
    )
    paths = images(tmp_path)
    # In training mode only the switch of the mode is new.
    count = SWITCHES if training else CHATS
    chats = [requests(paths, thread, count) for thread in range(THREADS)]
    wanted = [answers(model, each) for each in chats]
    assert len({answer for each in wanted for chat in each for answer in chat}) > 8
    decoded.clear()
    begin = threading.Barrier(THREADS)

    def ask(each: Sequence[Sequence[dict[str, Any]]]) -> list[list[str]]:
        begin.wait()
        return answers(model, each)

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(ask, chats)) == wanted
    assert model.training == training
    if "head_dim" in change[1]:
        assert len(set(decoded)) == THREADS
