"""A run that was stopped and resumed is bit for bit the run that was never stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny_models import assert_same_bits, interrupted, parsed, with_tune
from vlm_tune.api import sft
from vlm_tune.config.recipe import Recipe
from vlm_tune.events import Evaluation

STAGES = """
stages:
  - name: align
    data: {augment: {flip: 0.5, shift: 0.2}}
    train: {steps: 4, batch_size: 3}
    tune: [{match: "tower.*", how: full}, {match: "connector.*", how: full}, \
{match: "llm.*", how: frozen}]
  - name: instruct
    train: {steps: 6}
"""
DROPOUT = """
tune:
  - {match: "tower.*", how: frozen}
  - {match: "connector.*", how: full}
  - {match: "llm.*", how: lora, r: 4, lora_dropout: 0.2, target_modules: all-linear}
train:"""


def two_stages(
    tiny_recipe: Callable[..., str], kind: str, output: str, precision: str = "fp32", **changes: Any
) -> Recipe:
    """Full training of the tower, then LoRA with dropout.

    8 rows in batches of 3 or 2 with accumulation 2.
    """
    text = with_tune(tiny_recipe(kind, output=output, precision=precision), DROPOUT) + STAGES
    settings = {
        "train__batch_size": 2,
        "train__gradient_accumulation": 2,
        "train__log_every": 1,
        "evaluate__every": 2,
        "evaluate__samples": 2,
    }
    return parsed(text, **settings, train__checkpoints={"keep": 10}, **changes)


def run_of(recipe: Recipe, *, resume: bool = False, show: Any = None) -> Any:
    return sft(recipe, resume=resume, show=show)


def logged(run: Path) -> list[dict[str, Any]]:
    """The log's training and evaluation events without what depends on time."""
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    keys = ("event", "stage", "step", "loss", "learning_rate", "accuracy")
    return [
        {key: event.get(key) for key in keys}
        for event in events
        if event["event"] in ("train", "evaluate")
    ]


def assert_same_runs(one: Path, other: Path) -> None:
    """Weights, optimizer, random state, losses, answers: all equal."""
    assert logged(one) == logged(other)
    assert_same_bits(one / "model", other / "model")
    last = [
        sorted(path.relative_to(run) for path in run.glob("stages/*/checkpoints/step-*"))[-1]
        for run in (one, other)
    ]
    assert last[0] == last[1]
    assert_same_bits(one / last[0], other / last[1])
    assert (one / "samples.json").read_text() == (other / "samples.json").read_text()
    assert json.loads((one / "tuning.json").read_text()) == json.loads(
        (other / "tuning.json").read_text()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "precision", "stage", "step"),
    [
        ("causal", "fp32", 0, 1),
        ("seq2seq", "fp32", 0, 4),
        ("causal", "fp32", 1, 5),
        ("causal", "bf16", 1, 1),
        ("seq2seq", "bf16", 1, 5),
    ],
)
def test_resumed_is_bit_for_bit_the_uninterrupted(
    kind: str,
    precision: str,
    stage: int,
    step: int,
    tiny_recipe: Callable[..., str],
    tmp_path: Path,
) -> None:
    sft(two_stages(tiny_recipe, kind, "whole", precision))
    recipe = two_stages(tiny_recipe, kind, "parts", precision)
    interrupted(partial(run_of, recipe), stage=stage, step=step)
    assert not (tmp_path / "parts" / "model").exists()
    sft(recipe, resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_resumed_twice_is_the_same(tiny_recipe: Callable[..., str], tmp_path: Path) -> None:
    sft(two_stages(tiny_recipe, "causal", "whole"))
    recipe = two_stages(tiny_recipe, "causal", "parts")
    interrupted(partial(run_of, recipe), stage=0, step=3)
    interrupted(partial(run_of, recipe, resume=True), stage=1, step=3)
    sft(recipe, resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")
    sft(recipe, resume=True)  # a finished run: nothing is left to do
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_a_log_line_of_many_steps_counts_those_before_the_stop(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    changes = {"train__steps": 6, "train__batch_size": 2, "train__gradient_accumulation": 2}
    whole = parsed(tiny_recipe("causal", output="whole"), **changes, train__log_every=3)
    sft(whole)
    recipe = parsed(tiny_recipe("causal", output="parts"), **changes, train__log_every=3)
    interrupted(lambda show: sft(recipe, show=show), stage=0, step=2, at=Evaluation)
    sft(recipe, resume=True)
    assert_same_bits(tmp_path / "whole" / "model", tmp_path / "parts" / "model")
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


@pytest.mark.slow
def test_lora_on_some_layers_of_many_resumes(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """More than twenty target modules that are not all of their kind: PEFT rewrites such lists."""

    def recipe(output: str) -> Recipe:
        tune = DROPOUT.replace(
            '  - {match: "llm.*", how: lora',
            '  - {match: "llm.model.layers.5.*", how: frozen}\n  - {match: "llm.*", how: lora',
        )
        text = with_tune(tiny_recipe("causal", output=output), tune).replace(
            "num_hidden_layers: 2", "num_hidden_layers: 6"
        )
        return parsed(
            text,
            train__log_every=1,
            train__checkpoints={"keep": 10, "every": 1},
            evaluate__samples=0,
        )

    sft(recipe("whole"))
    interrupted(partial(run_of, recipe("parts")), stage=0, step=2)
    sft(recipe("parts"), resume=True)
    assert_same_runs_without_samples(tmp_path / "whole", tmp_path / "parts")


def assert_same_runs_without_samples(one: Path, other: Path) -> None:
    assert logged(one) == logged(other)
    assert_same_bits(one / "model", other / "model")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "tower", "llm"),
    [
        (
            "causal",
            "how: full, layer_decay: 0.7",
            "how: lora, r: 4, init: pissa, lora_plus_ratio: 8, lora_dropout: 0.1",
        ),
        ("seq2seq", "how: norms", "how: lora, r: 4, variant: dora"),
        ("causal", "how: biases", "how: last_layers, layers: 1, layer_decay: 0.5"),
    ],
)
def test_every_kind_of_tuning_resumes(
    kind: str, tower: str, llm: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    tune = f"""
tune:
  - {{match: "tower.*", {tower}}}
  - {{match: "connector.*", how: full}}
  - {{match: "llm.*", {llm}}}
train:"""

    def recipe(output: str) -> Recipe:
        text = with_tune(tiny_recipe(kind, output=output, precision="bf16"), tune)
        return parsed(
            text,
            train__log_every=1,
            train__checkpoints={"keep": 10, "every": 1},
            evaluate__samples=0,
        )

    sft(recipe("whole"))
    interrupted(partial(run_of, recipe("parts")), stage=0, step=2)
    sft(recipe("parts"), resume=True)
    assert_same_runs_without_samples(tmp_path / "whole", tmp_path / "parts")
    if "lora" in llm:
        from vlm_tune.exporting.merge import merge

        report = merge(tmp_path / "parts", tmp_path / "merged", dtype="fp32")
        assert 0 <= report.difference_to_adapter <= 1e-4 < report.difference_to_base
