"""Reward functions of sampled completions, by name: metrics, a format, and functions as TRL's.

A function is called as `GRPOTrainer` calls it: with the prompts and completions as lists of
messages, and columns of the rows by name. It returns a number, or None, for each completion.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_tune.config.grpo import Grpo, RewardFunction
from vlm_tune.config.objectives import AnyObjective
from vlm_tune.config.train import REWARDS
from vlm_tune.data.types import Conversation, Message
from vlm_tune.errors import DataError, Problem, RecipeError, TrainingError
from vlm_tune.evaluation.evaluate import row_answers
from vlm_tune.evaluation.metric import Metric
from vlm_tune.evaluation.registry import METRICS, failure_of, import_function
from vlm_tune.quoting import quoted, reason_of

KEY = "objective.reward_funcs"
COLUMNS = ("solution", "answers", "choices", "chosen", "category", "id")
"""The names of the columns that functions get beside prompts, completions and their ids."""
MOST_REWARD = 1e9
"""The largest reward, either way: squares of larger ones, weighted, leave the range of fp32."""


@dataclass(frozen=True)
class Sample:
    """A sampled completion of a row.

    Attributes:
        row: the row.
        text: the answer, without the reasoning before it; metrics score it.
        ids: the completion's ids with the stop token.
        whole: the completion's text with its reasoning, as it was generated; functions get it.
    """

    row: Conversation
    text: str
    ids: Sequence[int]
    whole: str


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
        except KeyboardInterrupt:
            raise
        # A user's function may raise anything, or end the process.
        except BaseException as error:
            message = f"{quoted(name)} does not take its arguments: {reason_of(error)}"
            raise RecipeError([Problem(KEY, message)]) from None
        if not callable(function):
            message = (
                f"{quoted(name)} returned no function for its arguments, but {quoted(function)}"
            )
            raise RecipeError([Problem(KEY, message)])
    _check_call(name, function)
    return _function_reward(name, function)


def _check_call(name: str, function: Callable[..., Any]) -> None:
    """Raises `RecipeError` for a function that can't be called as a reward function is."""
    if any(map(inspect.iscoroutinefunction, (function, type(function).__call__))):
        message = f"{quoted(name)} is asynchronous, expected a function that returns its rewards"
        raise RecipeError([Problem(KEY, message)])
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # one written in C may have none
        return
    names = ("prompts", "completions", "completion_ids", *COLUMNS)
    try:
        signature.bind(**dict.fromkeys(names))
    except TypeError as error:
        message = (
            f"{quoted(name)} can't be called as a reward function: {reason_of(error)}; it gets "
            f"{', '.join(names)} by name: end its parameters with **columns"
        )
        raise RecipeError([Problem(KEY, message)]) from None


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
                completions=[[{"role": "assistant", "content": each.whole}] for each in samples],
                completion_ids=[list(each.ids) for each in samples],
                **_columns([each.row for each in samples]),
            )
            if isinstance(rewards, Iterator):  # a generator runs while it is read
                rewards = list(rewards)
        except KeyboardInterrupt:
            raise
        # A user's function may raise anything, or end the process.
        except BaseException as error:
            raise TrainingError(f"the reward function {name} failed: {failure_of(error)}") from None
        return _numbers(name, rewards, len(samples))

    return score


def _numbers(name: str, rewards: Any, expected: int) -> list[float]:
    """The rewards that a function returned, NaN for None; checked."""
    try:
        if isinstance(rewards, str | Mapping):  # their characters and keys are no rewards
            raise TypeError
        rewards = list(rewards)
    except TypeError:
        raise TrainingError(
            f"the reward function {name} returned {quoted(rewards)}, expected a list with a "
            "number, or None, for each completion"
        ) from None
    if len(rewards) != expected:
        raise TrainingError(
            f"the reward function {name} returned a list of {len(rewards)} for {expected} "
            "completions; it returns a number, or None, for each"
        )
    numbers = []
    for place, reward in enumerate(rewards, 1):
        try:
            number = math.nan if reward is None else float(reward)
        except Exception:  # whatever an object of the user's raises
            number = math.inf
        if abs(number) > MOST_REWARD:
            raise TrainingError(
                f"the reward function {name} returned {quoted(reward)} for completion {place}, "
                f"expected a number from {-MOST_REWARD:,.0f} to {MOST_REWARD:,.0f}, or None"
            )
        numbers.append(number)
    return numbers


def _messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Turns as TRL passes them: a text, or a list of parts where there are images."""
    return [
        {
            "role": message.role,
            "content": message.text
            if all(isinstance(part, str) for part in message.parts)
            else [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": part.modality}
                for part in message.parts
            ],
        }
        for message in messages
    ]


def _columns(rows: Sequence[Conversation]) -> dict[str, list[Any]]:
    """The columns that functions get beside prompts, completions and their ids, by name."""
    values = [
        (
            row.messages[-1].text.strip(),
            list(row.references.answers),
            list(row.references.choices),
            row.references.chosen,
            row.category,
            row.id,
        )
        for row in rows
    ]
    return {
        name: list(column) for name, column in zip(COLUMNS, zip(*values, strict=True), strict=True)
    }
