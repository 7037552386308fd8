"""Frozen weights keep their bytes; trained weights get a gradient and change."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.tiny_models import LORA_TUNE, built, one_step, parsed, stage_loop, with_tune
from vlm_tune.api import sft
from vlm_tune.events import Event, StageStart

FULL = """
tune:
  - {match: "tower.*", how: full, learning_rate: 1.0e-3}
  - {match: "connector.*", how: full}
  - {match: "llm.*", how: full}
train:"""
MIXED = """
tune:
  - {match: "tower.*", how: frozen}
  - {match: "connector.*", how: frozen}
  - {match: "llm.shared.*", how: full}
  - {match: "llm.encoder.*", how: lora, r: 2}
  - {match: "*", how: frozen}
train:"""


def digest(value: torch.Tensor) -> str:
    return hashlib.sha256(
        value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    ).hexdigest()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kind", "tune"),
    [
        ("causal", LORA_TUNE),
        ("seq2seq", LORA_TUNE),
        ("causal", FULL),
        ("seq2seq", FULL),
        ("seq2seq", MIXED),
    ],
)
def test_frozen_bytes_stay_and_trained_ones_change(
    kind: str, tune: str, precision: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    recipe = parsed(with_tune(tiny_recipe(kind, precision=precision), tune), train__steps=3)
    model = built(recipe)
    loop = stage_loop(model, recipe, tmp_path / "run")
    before = {name: digest(parameter) for name, parameter in model.named_parameters()}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    half = torch.bfloat16 if precision == "bf16" else torch.float32
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (half if name in frozen else torch.float32), name
    loop.run()
    after = {name: digest(parameter) for name, parameter in model.named_parameters()}
    assert {name for name in before if before[name] != after[name]} == before.keys() - frozen
    grouped = {name for names in loop.tuned.names for name in names}
    assert len(grouped) == len(before) - len(frozen)


@pytest.mark.parametrize(
    ("kind", "tune"), [("causal", FULL), ("seq2seq", FULL), ("seq2seq", MIXED)]
)
def test_every_trained_parameter_has_a_gradient(
    kind: str, tune: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    recipe = parsed(
        with_tune(tiny_recipe(kind), tune),
        train__steps=1,
        train__log_every=1,
        train__batch_size=8,
        train__max_grad_norm=None,
    )
    _, gradients = one_step(recipe, tmp_path / "run")
    model = built(recipe)
    stage_loop(model, recipe, tmp_path / "other")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == gradients.keys()
    # LoRA A gets its first gradient once B has left zero.
    still = {
        name
        for name, value in gradients.items()
        if not float(value.abs().sum()) and "lora_A" not in name
    }
    assert still == set()


@pytest.mark.slow
@pytest.mark.parametrize(("common", "other"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_each_stage_trains_in_its_own_precision(
    common: str, other: str, tiny_recipe: Callable[..., str]
) -> None:
    stages = f"stages: [{{name: one, train: {{precision: {other}}}}}, {{name: two}}]\n"
    recipe = parsed(
        tiny_recipe("causal", precision=common) + stages, evaluate__samples=0, train__steps=1
    )
    seen: dict[str, set[torch.dtype]] = {}
    stage = [""]
    forward = torch.nn.functional.linear

    def linear(value: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        output = forward(value, *rest)
        if output.requires_grad:
            seen.setdefault(stage[0], set()).add(output.dtype)
        return output

    def show(event: Event) -> None:
        if isinstance(event, StageStart):
            stage[0] = event.name

    torch.nn.functional.linear = linear
    try:
        run = sft(recipe, show=show)
    finally:
        torch.nn.functional.linear = forward
    kinds = {"bf16": {torch.bfloat16}, "fp32": {torch.float32}}
    assert seen == {"one": kinds[other], "two": kinds[common]}
    assert run.model.config.model.llm.kind == "causal"
