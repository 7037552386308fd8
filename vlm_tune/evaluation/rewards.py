"""Reward functions of sampled completions, by name: metrics, a format, and functions as TRL's.

A function is called as `GRPOTrainer` calls it: with the prompts and completions as lists of
messages, and columns of the rows by name. It returns a number, or None, for each completion.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_tune.config.grpo import Grpo, RewardFunction
from vlm_tune.config.objectives import AnyObjective
from vlm_tune.config.train import REWARDS
from vlm_tune.data.types import Conversation, Message
from vlm_tune.errors import DataError, Problem, RecipeError, TrainingError
from vlm_tune.evaluation.evaluate import row_answers
from vlm_tune.evaluation.metric import Metric
from vlm_tune.evaluation.registry import METRICS, import_function
from vlm_tune.quoting import quoted, reason_of

KEY = "objective.reward_funcs"


@dataclass(frozen=True)
class Sample:
    """A sampled completion: the row, its text, and its ids with the stop token."""

    row: Conversation
    text: str
    ids: Sequence[int]


Reward = Callable[[Sequence[Sample]], list[float]]
"""A function of samples: a reward for each, NaN where it has none."""


def reward_functions(objective: Grpo) -> list[Reward]:
    """The reward functions of an objective.

    Raises `RecipeError` for functions that can't be imported or made.
    """
    return [_reward(function) for function in objective.functions]


def check_rewards(objectives: Iterable[AnyObjective]) -> None:
    """Raises `RecipeError` where an objective names a reward function that there is not."""
    for objective in objectives:
        if isinstance(objective, Grpo):
            reward_functions(objective)


def check_rewarded(objective: Grpo, rows: Iterable[Conversation]) -> None:
    """Checks that the rewards can tell completions of some row apart; reads up to the first one.

    A function of a user's may reward any row.

    Raises:
        DataError: All rewards are metrics, and none of them can score any of the rows.
    """
    names = [function.function for function in objective.functions]
    if not all(name in REWARDS for name in names):
        return
    metrics = [METRICS[name] for name in names]
    for row in rows:
        (answer,) = row_answers([row], [""])
        if any(metric.applies(answer) for metric in metrics):
            return
    needs = "; ".join(f"{metric.name} needs {metric.needs}" for metric in metrics)
    raise DataError(
        f"no row can be rewarded, so that nothing would be learned: {needs}",
        source=KEY,
        kind="form",
    )


def format_reward(pattern: str) -> Callable[..., list[float]]:
    """A function that gives 1 to completions that a regular expression matches as a whole."""
    compiled = re.compile(pattern, re.DOTALL)

    def score(completions: Sequence[Sequence[Mapping[str, str]]], **_: Any) -> list[float]:
        return [float(compiled.fullmatch(each[0]["content"]) is not None) for each in completions]

    return score


def _reward(described: RewardFunction) -> Reward:
    """The function that a recipe describes."""
    name = described.function
    if name in REWARDS:
        return _metric_reward(METRICS[name])
    function = format_reward if name == "format" else import_function(name, KEY)
    if described.arguments:
        try:
            function = function(**described.arguments)
        # A user's function may raise anything, or end the process.
        except (Exception, SystemExit) as error:
            message = f"{quoted(name)} does not take its arguments: {reason_of(error)}"
            raise RecipeError([Problem(KEY, message)]) from None
        if not callable(function):
            message = (
                f"{quoted(name)} returned no function for its arguments, but {quoted(function)}"
            )
            raise RecipeError([Problem(KEY, message)])
    return _function_reward(name, function)


def _metric_reward(metric: Metric) -> Reward:
    """A metric's score of each sample by itself, from 0 to 1; none where it does not apply."""

    def score(samples: Sequence[Sample]) -> list[float]:
        answers = row_answers([each.row for each in samples], [each.text for each in samples])
        return [
            float(metric.value(metric.statistics([answer])[0])) / (metric.top or 1.0)
            if metric.applies(answer)
            else math.nan
            for answer in answers
        ]

    return score


def _function_reward(name: str, function: Callable[..., Any]) -> Reward:
    """A function with TRL's signature."""

    def score(samples: Sequence[Sample]) -> list[float]:
        try:
            rewards = function(
                prompts=[_messages(each.row.messages[:-1]) for each in samples],
                completions=[[{"role": "assistant", "content": each.text}] for each in samples],
                completion_ids=[list(each.ids) for each in samples],
                **_columns([each.row for each in samples]),
            )
            numbers = [math.nan if reward is None else float(reward) for reward in rewards]
        # A user's function may raise anything, or end the process.
        except (Exception, SystemExit) as error:
            raise TrainingError(
                f"the reward function {name} failed: {type(error).__name__}: {reason_of(error)}"
            ) from None
        if len(numbers) != len(samples):
            raise TrainingError(
                f"the reward function {name} returned {len(numbers)} rewards for {len(samples)} "
                "completions; it returns one for each, or None"
            )
        if any(map(math.isinf, numbers)):
            raise TrainingError(
                f"the reward function {name} returned an infinite reward, expected finite numbers"
            )
        return numbers

    return score


def _messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Turns as TRL passes them: a text, or a list of parts where there are images."""
    return [
        {
            "role": message.role,
            "content": message.text
            if all(isinstance(part, str) for part in message.parts)
            else [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in message.parts
            ],
        }
        for message in messages
    ]


def _columns(rows: Sequence[Conversation]) -> dict[str, list[Any]]:
    """The columns that functions get beside prompts and completions, by name."""
    return {
        "solution": [row.messages[-1].text.strip() for row in rows],
        "answers": [list(row.references.answers) for row in rows],
        "choices": [list(row.references.choices) for row in rows],
        "chosen": [row.references.chosen for row in rows],
        "category": [row.category for row in rows],
        "id": [row.id for row in rows],
    }
