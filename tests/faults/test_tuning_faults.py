"""Fault 52: what is frozen keeps its bytes, and what trains gets a gradient, in every tuning."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny_models import built, parsed, stage_loop, with_tune

TUNE = """
tune:
  - {{match: "{part}.*", {rule}}}
  - {{match: "*", how: frozen}}
train:"""
ANY_LLM = {
    "full": "how: full",
    "decay": "how: full, layer_decay: 0.7",
    "last_layers": "how: last_layers, layers: 1",
    "norms": "how: norms",
    "lora": "how: lora, r: 4",
    "rslora": "how: lora, r: 4, variant: rslora, init: gaussian",
    "dora": "how: lora, r: 4, variant: dora",
    "pissa": "how: lora, r: 4, init: pissa, lora_plus_ratio: 4",
    "prompt": "how: prompt, tokens: 4",
    "prefix": "how: prefix, tokens: 4",
}
CASES = [
    *[
        (kind, "llm", name, rule)
        for kind in ("causal", "seq2seq")
        for name, rule in ANY_LLM.items()
    ],
    *[
        ("causal", "tower", name, ANY_LLM[name])
        for name in ("full", "decay", "last_layers", "norms", "pissa")
    ],
    ("causal", "tower", "biases", "how: biases"),
]


def digest(value: torch.Tensor) -> str:
    return hashlib.sha256(
        value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    ).hexdigest()


@pytest.mark.parametrize(
    ("kind", "part", "name", "rule"),
    CASES,
    ids=[f"{kind}-{part}-{name}" for kind, part, name, _ in CASES],
)
def test_fault_52_a_frozen_weight_changes(
    kind: str, part: str, name: str, rule: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    text = with_tune(tiny_recipe(kind, precision="bf16"), TUNE.format(part=part, rule=rule))
    recipe = parsed(text, train__steps=2, train__batch_size=8, train__max_grad_norm=None)
    model = built(recipe)
    loop = stage_loop(model, recipe, tmp_path / "run")
    before = {
        parameter_name: digest(parameter) for parameter_name, parameter in model.named_parameters()
    }
    trained = {
        parameter_name
        for parameter_name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    steps: list[dict[str, float]] = []

    def note(optimizer: Any, arguments: Any, named: Any) -> None:
        steps.append(
            {
                parameter_name: float(p.grad.abs().sum())
                for parameter_name, p in model.named_parameters()
                if p.grad is not None
            }
        )

    inner: Any = loop.engine.optimizer.optimizer
    inner.register_step_pre_hook(note)
    loop.run()
    assert len(steps) == 2
    assert all(step.keys() == trained for step in steps)
    # LoRA's A gets its first gradient once B has left zero.
    assert {parameter_name for parameter_name, value in steps[1].items() if value} == trained
    changed = {
        parameter_name
        for parameter_name, parameter in model.named_parameters()
        if digest(parameter) != before[parameter_name]
    }
    assert changed == trained
    row, rest = loop.tuned.table
    assert (row.trained, rest.trained) == (
        sum(
            p.numel() for parameter_name, p in model.named_parameters() if parameter_name in trained
        ),
        0,
    )
    assert (
        row.trained + rest.total
        <= sum(parameter.numel() for parameter in model.parameters())
        == row.total + rest.total
    )
