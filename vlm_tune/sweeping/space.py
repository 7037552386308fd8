"""The search space of a sweep: the recipe's keys, and the values that each may take."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from vlm_tune.config.load import changed_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.config.yaml_source import Located, apply_override
from vlm_tune.errors import Problem, RecipeError, is_finite
from vlm_tune.quoting import cut, quoted

if TYPE_CHECKING:
    import numpy as np
    from optuna.distributions import BaseDistribution
    from optuna.trial import Trial

Scalar = str | int | float | bool | None
"""A value that a search can give to a key."""

FORMS = "log:LOW..HIGH, LOW..HIGH, LOW..HIGH:STEP or A,B,C"
"""How the values of a key are written."""
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
RANGE = re.compile(rf"(log:)?({NUMBER})\.\.({NUMBER})(?::({NUMBER}))?")
WHOLE = re.compile(r"[-+]?\d+")
LONGEST_RANGE = 100
"""Characters of a text that may be a range."""
MOST_CORNERS = 256
"""Combinations of the ends of all ranges that are checked together before the first trial."""
FIXED = (
    ("name",),
    ("output",),
    ("data", "validation"),
    ("data", "split"),
    ("evaluate", "best"),
    ("evaluate", "limit"),
    ("evaluate", "metrics"),
    ("objective", "kind"),
    ("objective", "scored_by"),
)
"""Keys, also of a stage, that no search changes: trials are compared by the score they decide."""


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included.

    Attributes:
        low, high: the ends, both integers or both floats. Integers have integers between them.
        log: whether the logarithm is what spreads evenly.
        step: the distance of the values; None for all floats, or all integers.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether its values are integers."""
        return isinstance(self.low, int)

    @property
    def written(self) -> str:
        """The range as `--search` takes it."""
        step = "" if self.step is None else f":{self.step!r}"
        return f"{'log:' if self.log else ''}{self.low!r}..{self.high!r}{step}"

    @property
    def ends(self) -> tuple[float, ...]:
        """The smallest and the largest value."""
        return self.low, self.high

    @property
    def size(self) -> float:
        """The number of values; infinite for floats without a step."""
        if self.step is None:
            return self.high - self.low + 1 if self.whole else math.inf
        return round((self.high - self.low) / self.step) + 1

    def draw(self, generator: np.random.Generator) -> float:
        """One of the values of a range that has finitely many, each as likely as any other."""
        place = int(generator.integers(int(self.size)))
        step = 1 if self.step is None else self.step
        return self.low + place * step if self.whole else _float_sum(self.low, place, step)

    def distribution(self) -> BaseDistribution:
        """The range as optuna has it."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.whole:
            step = 1 if self.step is None else int(self.step)
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=step)
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def suggest(self, trial: Trial, key: str) -> float:
        """The value of a key in one of optuna's trials."""
        if self.whole:
            step = 1 if self.step is None else int(self.step)
            return trial.suggest_int(key, int(self.low), int(self.high), log=self.log, step=step)
        return trial.suggest_float(key, self.low, self.high, log=self.log, step=self.step)


@dataclass(frozen=True)
class Choices:
    """Several values, of which none is nearer to another."""

    values: tuple[Scalar, ...]

    @property
    def written(self) -> list[Scalar]:
        """The values as a list."""
        return list(self.values)

    @property
    def ends(self) -> tuple[Scalar, ...]:
        """All values: none lies between others."""
        return self.values

    @property
    def size(self) -> float:
        """The number of values."""
        return len(self.values)

    def draw(self, generator: np.random.Generator) -> Scalar:
        """One of the values, each as likely as any other."""
        return self.values[int(generator.integers(len(self.values)))]

    def distribution(self) -> BaseDistribution:
        """The values as optuna has them."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)

    def suggest(self, trial: Trial, key: str) -> Scalar:
        """The value of a key in one of optuna's trials."""
        return trial.suggest_categorical(key, self.values)


Dimension = Range | Choices
Space = Mapping[str, Dimension]
"""The search space of a sweep: the values of each key, by its dotted name."""


def parse_search(search: Mapping[str, str | Sequence[Scalar]]) -> dict[str, Dimension]:
    """Reads a search space: texts as `log:1e-5..1e-3`, or lists of values, by a recipe's keys.

    Raises `RecipeError` with every fault.
    """
    if not isinstance(search, Mapping) or not search:
        message = f"expected recipe keys with values written as {FORMS}, got {quoted(search)}"
        raise RecipeError([Problem("--search", message)])
    space: dict[str, Dimension] = {}
    problems = []
    for key, values in search.items():
        try:
            space[str(key)] = _dimension(str(key), values)
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return space


def _dimension(key: str, values: Any) -> Dimension:
    """The values of one key. Raises `RecipeError`."""
    where = _place(key, values)
    parts = [part for part in key.split(".") if not part.isdecimal() and part != "stages"]
    if any(tuple(parts[: len(fixed)]) == fixed for fixed in FIXED):
        message = f"{cut(key)} can't be searched: it decides where runs lie or how they are scored"
        raise RecipeError([Problem(where, message)])
    if isinstance(values, str):
        match = RANGE.fullmatch(values.strip()) if len(values) <= LONGEST_RANGE else None
        if match is not None:
            return _range(where, *match.groups())
        if not values.strip().startswith("log:"):
            values = _listed(where, values)
    if not isinstance(values, list | tuple) or len(values) < 2:
        message = f"expected two values or more, written as {FORMS}, got {quoted(values)}"
        raise RecipeError([Problem(where, message)])
    for place, value in enumerate(values):
        number = isinstance(value, int | float)
        if not (value is None or isinstance(value, str) or (number and is_finite(value))):
            message = (
                f"expected plain values (texts, finite numbers, true, false), got {quoted(value)}"
            )
            raise RecipeError([Problem(where, message)])
        if value in values[:place]:
            raise RecipeError([Problem(where, f"the value {quoted(value)} comes twice")])
    return Choices(tuple(values))


def _place(key: str, values: Any) -> str:
    """The option that gives these values, as the place of a fault."""
    return f"--search {cut(key)}" + (f"={cut(values)}" if isinstance(values, str) else "")


def _listed(where: str, text: str) -> list[Any]:
    """The values of a text with commas between, read as YAML. Raises `RecipeError`."""
    located = Located({})
    try:
        apply_override(located, f"values=[{text}]")
    except RecipeError as error:
        message = f"{error.problems[0].message}; values are written as {FORMS}"
        raise RecipeError([Problem(where, message)]) from None
    return located.value["values"]


def _range(where: str, log: str | None, low: str, high: str, step: str | None) -> Range:
    """The range of a text's parts. Raises `RecipeError`."""
    texts = [low, high] if step is None else [low, high, step]
    whole = all(map(WHOLE.fullmatch, texts))
    first, last, *rest = (int(text) if whole else float(text) for text in texts)
    distance = rest[0] if rest else None
    fault = None
    if not all(map(is_finite, (first, last, distance or 0))):
        fault = "a number of it is too large"
    elif first >= last:
        fault = f"expected LOW..HIGH with LOW under HIGH, got {low}..{high}"
    elif log and first <= 0:
        fault = f"a logarithmic range starts above 0, not at {low}"
    elif log and distance is not None:
        fault = "a logarithmic range has no step"
    elif distance is not None and not 0 < distance <= last - first:
        fault = f"expected a step above 0 and up to {last - first:g}, got {step}"
    if fault is not None:
        raise RecipeError([Problem(where, fault)])
    if distance is not None:
        # The last value that the steps reach.
        steps = int((Decimal(high) - Decimal(low)) // Decimal(str(step)))
        last = first + steps * distance if whole else _float_sum(first, steps, distance)
    return Range(first, last, log is not None, distance)


def _float_sum(first: float, count: int, step: float) -> float:
    """`first + count * step` in decimals, so that 0.1 + 2 * 0.1 is 0.3."""
    return float(Decimal(repr(first)) + count * Decimal(repr(step)))


def check_space(recipe: Recipe, space: Space) -> None:
    """Checks that the recipe takes the ends of each range, alone and with those of the others.

    Raises:
        RecipeError: a key is unknown, with the nearest one, or a value is none that it takes.
    """
    problems = [
        problem
        for key, dimension in space.items()
        for end in dimension.ends
        for problem in _problems(recipe, {key: end})
    ]
    if not problems and math.prod(len(each.ends) for each in space.values()) <= MOST_CORNERS:
        for corner in itertools.product(*(each.ends for each in space.values())):
            problems += _problems(recipe, dict(zip(space, corner, strict=True)))
    if problems:
        # An unknown key has the same message at each end, of which the first one is enough.
        distinct = {problem.message: problem for problem in reversed(problems)}
        raise RecipeError(list(reversed(distinct.values())))


def _problems(recipe: Recipe, values: Mapping[str, Scalar]) -> list[Problem]:
    """The faults of the recipe with these values."""
    try:
        changed_recipe(recipe, values, option="--search")
    except RecipeError as error:
        return error.problems
    return []


def space_differences(old: Space, new: Space) -> list[str]:
    """Lines on the keys of which two spaces have other values, as `key: old -> new`."""

    def shown(space: Space, key: str) -> str:
        return json.dumps(space[key].written) if key in space else "not searched"

    lines = [(key, shown(old, key), shown(new, key)) for key in dict.fromkeys([*old, *new])]
    return [f"{key}: {cut(was)} -> {cut(now)}" for key, was, now in lines if was != now]
