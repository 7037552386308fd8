"""`init --from` of preferences and rewards, and of rows that are streamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import vlm_tune
from vlm_tune.errors import RecipeError
from vlm_tune.recipe_writer.written import Written

BASE = {
    "LLaMA-Factory": {"model_name_or_path": "some/model", "cutoff_len": 512, "dataset": "rows"},
    "ms-swift": {"model": "some/model", "dataset": ["rows.jsonl"], "tuner_type": "lora"},
    "TRL": {"model_name_or_path": "some/model", "dataset_name": "rows.jsonl", "use_peft": True},
}
OBJECTIVES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "LLaMA-Factory",
        {"stage": "dpo", "pref_beta": 0.2, "pref_ftx": 0.5},
        {"kind": "dpo", "beta": 0.2, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    ),
    (
        "LLaMA-Factory",
        {"stage": "dpo", "pref_loss": "simpo", "simpo_gamma": 0.3},
        {"kind": "simpo", "beta": 0.1, "simpo_gamma": 0.3},
    ),
    (
        "LLaMA-Factory",
        {"stage": "dpo", "finetuning_type": "full"},
        {"kind": "dpo", "reference": "copy"},
    ),
    ("LLaMA-Factory", {"stage": "dpo", "pref_loss": "orpo"}, {"kind": "orpo", "beta": 0.1}),
    (
        "LLaMA-Factory",
        {"stage": "kto", "kto_chosen_weight": 2.0},
        {"kind": "kto", "desirable_weight": 2.0, "undesirable_weight": 1.0},
    ),
    (
        "ms-swift",
        {"rlhf_type": "dpo", "rpo_alpha": 0.1, "loss_type": "hinge"},
        {"kind": "dpo", "loss_type": ["hinge", "sft"], "loss_weights": [1.0, 0.1]},
    ),
    ("ms-swift", {"rlhf_type": "kto", "beta": 0.3}, {"kind": "kto", "beta": 0.3}),
    (
        "ms-swift",
        {"rlhf_type": "simpo"},
        {"kind": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 1.0},
    ),
    (
        "ms-swift",
        {
            "rlhf_type": "grpo",
            "reward_funcs": ["accuracy", "format"],
            "reward_weights": ["1", "0.5"],
            "num_generations": 4,
            "epsilon_high": 0.28,
            "scale_rewards": "none",
            "overlong_filter": True,
            "truncation_strategy": "left",
            "packing": True,
        },
        {
            "kind": "grpo",
            "beta": 0.04,
            "loss_type": "grpo",
            "num_generations": 4,
            "epsilon_high": 0.28,
            "reward_weights": [1.0, 0.5],
            "scale_rewards": "none",
            "mask_truncated_completions": True,
        },
    ),
    (
        "TRL",
        {"reward_funcs": "think_format_reward,mine.rewards.short", "loss_type": "dr_grpo"},
        {
            "reward_funcs": ["trl.rewards:think_format_reward", "mine.rewards:short"],
            "loss_type": "dr_grpo",
            "beta": 0.0,
        },
    ),
    ("ms-swift", {"rlhf_type": "dpo", "model_type": "qwen2_5_vl"}, {"kind": "dpo"}),
    ("ms-swift", {"rlhf_type": "grpo", "model_type": "qwen3_5"}, {"kind": "grpo"}),
    ("TRL", {"beta": 0.05, "loss_type": ["ipo"]}, {"kind": "dpo", "loss_type": "ipo"}),
    ("TRL", {"desirable_weight": 1.5}, {"kind": "kto", "desirable_weight": 1.5}),
]


@pytest.mark.parametrize(("framework", "keys", "expected"), OBJECTIVES)
def test_preferences_and_rewards_are_objectives(
    framework: str,
    keys: dict[str, Any],
    expected: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    written = converted(BASE[framework] | keys)
    objective = written.recipe.objective
    assert {name: getattr(objective, name) for name in expected} == expected
    by_adapter = all(rule.how in ("lora", "frozen") for rule in written.recipe.tune)
    reference = "adapter_off" if by_adapter else "copy"
    assert objective.reference_model in (None, reference)
    assert {each.key for each in written.unmatched} <= {"dataset", "packing"}


@pytest.mark.parametrize(
    ("framework", "keys", "message"),
    [
        ("LLaMA-Factory", {"stage": "rm"}, "stage: 'rm': the stages that become a recipe are"),
        (
            "ms-swift",
            {"rlhf_type": "grpo", "num_generations": 1},
            "num_generations: 1: a group has 2 completions at least",
        ),
        (
            "LLaMA-Factory",
            {"stage": "dpo", "pref_ftx": -1},
            r"config.json: gives no valid recipe: objective.loss_weights.1: .* greater than 0",
        ),
        ("ms-swift", {"rlhf_type": "gkd"}, "rlhf_type: 'gkd': those that become a recipe are"),
        (
            "LLaMA-Factory",
            {"model_class": "llm", "train_dataset": "rows.yaml"},
            "is of LLaMA-Factory's v1 trainer",
        ),
    ],
)
def test_what_is_trained_otherwise_becomes_no_recipe(
    framework: str,
    keys: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=message):
        converted(BASE[framework] | keys)


@pytest.mark.parametrize(
    ("keys", "unmatched", "streamed"),
    [
        ({"max_steps": 10}, {"dataloader_num_workers", "the share of rows that is held out"}, True),
        ({}, {"streaming"}, False),
        ({"rlhf_type": "kto", "max_steps": 10}, {"streaming"}, False),
    ],
)
def test_a_stream_becomes_a_recipe_that_is_valid(
    keys: dict[str, Any],
    unmatched: set[str],
    streamed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    streaming = {"streaming": True, "dataloader_num_workers": 4, "split_dataset_ratio": 0.1}
    written = converted(BASE["ms-swift"] | streaming | keys)
    assert written.recipe.data.streaming is streamed
    assert {each.key for each in written.unmatched} == unmatched


def test_engines_that_shard_give_way_to_completions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = {"rlhf_type": "grpo", "reward_funcs": "format", "deepspeed": "zero3"}
    written = converted(BASE["ms-swift"] | keys)
    engine: Any = written.recipe.engine
    assert (engine.kind, engine.stage) == ("deepspeed", 2)
    assert [each.key for each in written.unmatched] == ["deepspeed"]


def converted(configuration: dict[str, Any]) -> Written:
    """A configuration of another framework as a recipe, in the working folder."""
    Path("config.json").write_text(json.dumps(configuration))
    return vlm_tune.init(configuration="config.json")


def test_a_system_text_in_a_file_is_not_taken_for_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written = converted(BASE["ms-swift"] | {"system": "prompts/think.txt"})
    assert written.recipe.data.system is None
    assert [each.key for each in written.unmatched] == ["system"]


@pytest.mark.parametrize(
    ("described", "columns"),
    [
        (
            {"formatting": "sharegpt", "columns": {"messages": "turns", "chosen": "good"}},
            {"conversations": "turns", "chosen": "good"},
        ),
        ({"columns": {"kto_tag": "liked"}}, {"prompt": "instruction", "label": "liked"}),
        ({"columns": {"prompt": "q", "rejected": "bad"}}, {"prompt": "q", "rejected": "bad"}),
    ],
)
def test_columns_of_judged_rows_are_those_of_preferences(
    described: dict[str, Any],
    columns: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    info = {"rows": {"file_name": "rows.json", "ranking": True, **described}}
    Path("data/dataset_info.json").write_text(json.dumps(info))
    written = converted(BASE["LLaMA-Factory"] | {"stage": "dpo"})
    source: Any = written.recipe.data.train[0]
    assert columns.items() <= source.columns.items()
