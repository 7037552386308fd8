"""Runs of native models on preferences and rewards: resumed, on two ranks, from the command line.

Models with branches, and models that read each answer in a row of its own.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.forked_runs import ended, start
from tests.helpers.native_models import native_recipe
from tests.helpers.policy_samples import policy_recipe
from tests.helpers.preference_samples import preference_text
from tests.helpers.tiny_models import (
    assert_same_bits,
    cli,
    interrupted,
    largest,
    parsed,
    tensors_of,
    with_tune,
)
from vlm_tune.api import dpo, grpo, kto
from vlm_tune.config.recipe import Recipe
from vlm_tune.data_check.check import check
from vlm_tune.events import Evaluation

LOW = "tests.helpers.policy_samples:low_share"
LORA = """
tune:
  - {match: "tower.*", how: lora, r: 4, lora_alpha: 8}
  - {match: "connector.*", how: frozen}
  - {match: "llm.*", how: lora, r: 4, lora_alpha: 8}
train:"""
CONNECTOR = LORA.replace("how: frozen", "how: full")
STEPS: dict[str, Any] = {
    "train__steps": 4,
    "train__log_every": 1,
    "train__batch_size": 2,
    "evaluate__every": 2,
    "evaluate__samples": 0,
    "data__test": [],
    "train__checkpoints": {"keep": 10},
}


def judged_recipe(
    make: Any,
    objective: str,
    *,
    output: str,
    tune: str = LORA,
    **changes: Any,
) -> Recipe:
    """A recipe of four steps on preferences about odd images."""
    text = preference_text(
        partial(make, output=output), "causal", objective, tune=tune, judged="kto" in objective
    )
    return parsed(text, **(STEPS | changes))


@pytest.mark.slow
def named(value: object) -> str:
    """A value in a test's id; that of a function has its address otherwise."""
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(
    ("kind", "train", "objective", "changes"),
    [
        ("lfm2_vl", dpo, "{kind: dpo}", {}),
        ("qwen3_vl", dpo, "{kind: dpo, reference: precomputed}", {"data__group": "image"}),
        ("lfm2_vl", dpo, "{kind: dpo, reference: precomputed}", {"tune": CONNECTOR}),
        ("qwen3_vl", kto, "{kind: kto, reference: copy}", {"tune": CONNECTOR}),
        ("lfm2_vl", kto, "{kind: kto}", {}),
        ("qwen2_5_vl", dpo, "{kind: orpo}", {"data__packing": True, "data__row_length": 512}),
    ],
    ids=named,
)
def test_a_resumed_run_of_preferences_is_the_uninterrupted_one(
    kind: str, train: Any, objective: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    make = native_recipe(tmp_path, kind)
    whole = train(judged_recipe(make, objective, output="whole", **changes))
    recipe = judged_recipe(make, objective, output="cut", **changes)
    interrupted(partial(train, recipe), at=Evaluation, stage=0, step=2)
    resumed = train(recipe, resume=True)
    last = "stages/1-main/checkpoints/step-0000004"
    assert_same_bits(whole.folder / last, resumed.folder / last)
    traces = [(run.folder / "stages/1-main/trace.jsonl").read_text() for run in (whole, resumed)]
    assert traces[0] == traces[1] and traces[0].count("\n") == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "objective", "changes"),
    [
        ("lfm2_vl", {"beta": 0.1, "num_iterations": 2, "loss_type": "dr_grpo"}, {}),
        ("qwen3_vl", {"importance_sampling_level": "sequence"}, {"data__group": "image"}),
        ("qwen3_vl", {"beta": 0.1, "reference": "copy"}, {"tune": CONNECTOR}),
    ],
    ids=named,
)
def test_a_resumed_run_of_rewards_is_the_uninterrupted_one(
    kind: str, objective: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    make = native_recipe(tmp_path, kind)
    options: dict[str, Any] = {
        "objective": {"reward_funcs": [LOW], **objective},
        "tune": LORA,
        **STEPS,
        **changes,
    }
    whole = grpo(policy_recipe(make, "causal", output="whole", **options))
    recipe = policy_recipe(make, "causal", output="cut", **options)
    interrupted(partial(grpo, recipe), at=Evaluation, stage=0, step=2)
    resumed = grpo(recipe, resume=True)
    last = "stages/1-main/checkpoints/step-0000004"
    assert_same_bits(whole.folder / last, resumed.folder / last)
    assert_same_bits(whole.folder / "model", resumed.folder / "model")


def logged(run: Path) -> list[dict[str, Any]]:
    lines = (run / "log.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "train"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "train"), [("lfm2_vl", dpo), ("qwen3_vl", grpo)], ids=named)
def test_two_ranks_train_as_one(kind: str, train: Any, tmp_path: Path) -> None:
    """Seven rows on two ranks: in the last step of an epoch one of them has none."""
    make = native_recipe(tmp_path, kind)

    def recipe(output: str, size: int) -> Recipe:
        changes = STEPS | {"train__batch_size": size, "data__validation": []}
        if train is dpo:
            return judged_recipe(make, "{kind: dpo}", output=output, **changes)
        objective = {"beta": 0.1, "scale_rewards": "batch", "reward_funcs": [LOW]}
        return policy_recipe(
            make, "causal", output=output, objective=objective, tune=LORA, **changes
        )

    train(recipe("one", 2))
    pids = start(partial(train, recipe("two", 1)), tmp_path / "ranks.txt", ranks=2)
    assert ended(pids) == [0, 0], (tmp_path / "ranks.txt.0").read_text()
    alone, together = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert len(alone) == len(together) == 4
    for one, both in zip(alone, together, strict=True):
        assert both["loss"] == pytest.approx(one["loss"], rel=1e-3, abs=1e-5)
        assert both["metrics"] == pytest.approx(one["metrics"], rel=1e-3, abs=1e-5)
    first, second = (tensors_of(tmp_path / output / "model") for output in ("one", "two"))
    assert first.keys() == second.keys()
    assert max(largest(value, second[name]) for name, value in first.items()) <= 3e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_vl", "lfm2_vl"])
def test_the_whole_way_through_the_command_line(kind: str, tmp_path: Path) -> None:
    """Instruction tuning, merged; from there preferences, and from these rewards; then scores."""
    make = native_recipe(tmp_path, kind)
    sft_text = with_tune(make(output="sft"), LORA)
    pairs = preference_text(partial(make, output="dpo"), "causal", "{kind: dpo}", tune=LORA)
    settings = f"num_generations: 3, max_completion_length: 4, beta: 0.1, reward_funcs: ['{LOW}']"
    group = f"{{kind: grpo, {settings}}}"
    rewarded = with_tune(make(output="grpo"), LORA).replace(
        "\ntrain: {", f"\nobjective: {group}\ntrain: {{"
    )
    start_from = str(tmp_path / "vlm")
    for command, text in (("sft", sft_text), ("dpo", pairs), ("grpo", rewarded)):
        recipe = tmp_path / f"{command}.yaml"
        recipe.write_text(text)
        changes = ("--set", f"model.pretrained={start_from}")
        # Validation rows are the training rows here, which `check` would report.
        checked = cli("check", str(recipe), *changes, "--set", "data.validation=[]", "--json")
        assert json.loads(checked)["errors"] == []
        shown = cli("show", str(recipe), *changes)
        plan = json.loads(cli("plan", str(recipe), *changes, "--json"))
        assert (
            "chosen:" in shown if command == "dpo" else "3 completions" in shown or text is sft_text
        )
        own_rows = "is a row of its own" in shown
        assert own_rows == (kind == "lfm2_vl" and command != "sft")
        assert plan["stages"][0]["source"].startswith("the largest of")
        cli(command, str(recipe), *changes, "--json")
        merged = tmp_path / f"{command}-merged"
        report = cli("merge", str(tmp_path / command), "--output", str(merged), "--json")
        assert json.loads(report.splitlines()[-1])["difference_to_base"] > 0
        part = ("--split", "validation", "--json")
        scored = cli("eval", str(merged), "--recipe", str(recipe), *changes, *part)
        assert json.loads(scored.splitlines()[-1])["n"] == 7
        start_from = str(merged)
    exported = json.loads(
        cli("export", str(tmp_path / "grpo"), "--output", str(tmp_path / "out"), "--json")
    )
    assert exported["same_text"] and exported["difference"] <= 1e-4


def test_check_takes_preferences_and_rewards_and_says_what_it_does_not_join(
    tmp_path: Path,
) -> None:
    make = native_recipe(tmp_path, "lfm2_vl")
    changes: dict[str, Any] = {"data__validation": []}
    pairs = judged_recipe(make, "{kind: dpo}", output="run", **changes)
    rewarded = policy_recipe(make, "causal", tune=LORA, **changes)
    assert not check(pairs).errors and not check(rewarded).errors
    joined = judged_recipe(make, "{kind: dpo}", output="run", data__group="image", **changes)
    (error,) = check(joined).errors
    assert error.kind == "unfit" and "set data.group: none" in error.message
    assert "another model" not in error.message
