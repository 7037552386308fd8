"""Reward functions: metrics, formats, TRL's own, and a user's with their faults."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vlm_tune
from tests.helpers.policy_samples import policy_recipe
from vlm_tune.config.grpo import Grpo
from vlm_tune.config.train import REWARDS
from vlm_tune.data.types import Conversation, Media, Message, References
from vlm_tune.errors import DataError, RecipeError, TrainingError
from vlm_tune.evaluation.registry import METRICS
from vlm_tune.evaluation.rewards import (
    Sample,
    check_rewarded,
    check_rewards,
    reward_functions,
)


def sample(text: str, answer: str = "12", **references: Any) -> Sample:
    picture = Media(b"picture")
    messages = (
        Message("user", (picture, "How many?")),
        Message("assistant", (answer,)),
    )
    row = Conversation("row", messages, references=References(**references))
    return Sample(row, text, [7, 8, 9], text)


def rewards(function: Any, *samples: Sample) -> list[float]:
    objective = Grpo.model_validate({"kind": "grpo", "reward_funcs": [function]})
    (reward,) = reward_functions(objective)
    return reward(samples)


@pytest.mark.parametrize(
    ("name", "samples", "expected"),
    [
        ("exact_match", [sample("12."), sample("13")], [1.0, 0.0]),
        ("relaxed_accuracy", [sample("12.5"), sample("14")], [1.0, 0.0]),
        (
            "choice_letter",
            [sample("B", "B", choices=("a", "b"), chosen=1), sample("B")],
            [1.0, math.nan],
        ),
        ("box_iou", [sample("[0, 0, 2, 1]", "[0, 0, 2, 2]"), sample("none")], [0.5, math.nan]),
        ("bleu", [sample("a b c d", "a b c d")], [1.0]),
    ],
)
def test_metrics_reward_single_answers(
    name: str, samples: list[Sample], expected: list[float]
) -> None:
    assert rewards(name, *samples) == pytest.approx(expected, nan_ok=True)


def test_every_metric_that_rewards_is_a_metric() -> None:
    assert set(REWARDS) <= METRICS.keys()


def test_a_format_is_a_pattern() -> None:
    described = {"function": "format", "arguments": {"pattern": "<think>.*</think>.+"}}
    texts = [sample("<think>two\nlines</think> 12"), sample("12"), sample("<think></think>")]
    assert rewards(described, *texts) == [1.0, 0.0, 0.0]


def test_trls_functions_are_used_as_they_are() -> None:
    thinking = [sample("<think>so</think> 12"), sample("12")]
    assert rewards("trl.rewards:think_format_reward", *thinking) == [1.0, 0.0]
    punishment = {
        "function": "trl.rewards:get_soft_overlong_punishment",
        "arguments": {"max_completion_len": 4, "soft_punish_cache": 2},
    }
    assert rewards(punishment, sample("a")) == [-0.5]


def test_a_function_gets_what_trl_gives_it(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "seen = {}\ndef note(**columns):\n    seen.update(columns)\n    return [0.5, None]\n"
    )
    monkeypatch.chdir(tmp_path)
    given = rewards("my_rewards:note", sample("12"), sample("13", choices=("a",)))
    assert given == pytest.approx([0.5, math.nan], nan_ok=True)
    import my_rewards  # type: ignore[import-not-found]

    seen = my_rewards.seen
    parts = [{"type": "image"}, {"type": "text", "text": "How many?"}]
    assert seen["prompts"] == [[{"role": "user", "content": parts}]] * 2
    assert seen["completions"][1] == [{"role": "assistant", "content": "13"}]
    assert seen["completion_ids"] == [[7, 8, 9]] * 2
    assert seen["solution"] == ["12", "12"] and seen["choices"] == [[], ["a"]]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", "returned a list of 1 for 2 completions"),
        ("return [1.0, float('inf')]", "returned inf for completion 2"),
        ("return [1.0, -1e30]", "returned -1e\\+30 for completion 2, expected a number from"),
        (
            "raise KeyError('x')",
            r"my_faults:score failed: KeyError: 'x' \(.*my_faults.py, line 2\)",
        ),
        (
            "import asyncio; raise asyncio.CancelledError('late')",
            r"failed: CancelledError: late \(.*my_faults.py, line 2\)",
        ),
        ("return ['a', 'b']", "returned 'a' for completion 1"),
        ("return None", r"returned nothing \(null\), expected a list with a number"),
        ("return {0: 1.0, 1: 2.0}", "returned a mapping with 0, 1, expected a list"),
        ("yield 1.0; raise KeyError('y')", r"failed: KeyError: 'y' \(.*my_faults.py, line 2\)"),
        ("import torch; return torch.tensor(1.0)", "returned a Tensor, expected a list"),
        ("return '01'", "returned '01', expected a list"),
        ("import torch; return torch.ones(2, 2)", "returned a Tensor for completion 1"),
    ],
)
def test_faults_of_a_function(
    body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_faults.py").write_text(f"def score(**columns):\n    {body}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_faults", raising=False)
    with pytest.raises(TrainingError, match=message):
        rewards("my_faults:score", sample("12"), sample("13"))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("def score(completions)", "unexpected keyword argument 'prompts'.*with \\*\\*columns"),
        ("def score(prompts, completions, other, **columns)", "missing a required argument"),
        ("async def score(**columns)", "is asynchronous"),
        ("class score", "can't be called as a reward function"),
    ],
)
def test_a_function_that_can_not_be_called_is_refused_before_training(
    head: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_functions.py").write_text(f"{head}:\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_functions", raising=False)
    with pytest.raises(RecipeError, match=message):
        check_rewards([grpo("my_functions:score")])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("trl.rewards:no_such", "no function"),
        ("no_such_module:score", "can't be imported"),
        ({"function": "format", "arguments": {"pattern": "("}}, "does not take its arguments"),
        ({"function": "format", "arguments": {"other": 1}}, "does not take its arguments"),
        ({"function": "math:sqrt", "arguments": {"x": 4}}, "does not take its arguments"),
        ({"function": "builtins:dict", "arguments": {"x": 4}}, "no function"),
        ("exits_at_import:score", "can't be imported from .*: SystemExit: 0"),
    ],
)
def test_functions_that_there_are_not(
    function: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "exits_at_import.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.chdir(tmp_path)
    objective = Grpo.model_validate({"kind": "grpo", "reward_funcs": [function]})
    with pytest.raises(RecipeError, match=message):
        check_rewards([objective])


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        (["exactmatch"], "did you mean exact_match"),
        (["perplexity"], "is no reward, and no my_module:function"),
        (["format"], "format needs a pattern"),
        ([{"function": "anls", "arguments": {"a": 1}}], "anls takes no arguments"),
    ],
)
def test_names_are_checked_with_the_recipe(
    functions: list[Any], message: str, tiny_recipe: Callable[..., str]
) -> None:
    with pytest.raises(RecipeError, match=message):
        policy_recipe(tiny_recipe, "causal", objective={"reward_funcs": functions})


def grpo(*functions: str) -> Grpo:
    return Grpo.model_validate({"kind": "grpo", "reward_funcs": list(functions)})


def test_rewards_that_no_row_can_get_are_an_error_before_training() -> None:
    """Every completion would have none, and a whole run would learn nothing."""
    words = [sample("", "a dog").row, sample("", "a cat").row]
    boxed = sample("", "[0, 0, 2, 2]").row
    with pytest.raises(DataError, match=r"no row can be rewarded.*box_iou needs .*point_accuracy"):
        check_rewarded(grpo("box_iou", "point_accuracy"), words)
    check_rewarded(grpo("box_iou", "point_accuracy"), [*words, boxed])
    check_rewarded(grpo("box_iou", "exact_match"), words)
    check_rewarded(grpo("box_iou", "trl.rewards:think_format_reward"), words)


def test_the_check_reports_them(tiny_recipe: Callable[..., str]) -> None:
    recipe = policy_recipe(tiny_recipe, "causal", objective={"reward_funcs": ["box_iou"]})
    report = vlm_tune.check(recipe)
    (error,) = [each for each in report.errors if each.source == "objective.reward_funcs"]
    assert error.kind == "form" and "box_iou needs" in error.message
