"""The errors that users see, each with its exit code."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from vlm_tune.quoting import escaped, quoted

EXIT_DONE = 0
EXIT_RECIPE = 2
EXIT_DATA = 3
EXIT_MODEL = 4
EXIT_TRAINING = 5
EXIT_INTERRUPTED = 130


class VlmTuneError(Exception):
    """Base of the errors that a user can fix; `exit_code` is what the command line returns."""

    exit_code = 1


@dataclass(frozen=True)
class Problem:
    """One fault in a recipe: its place (`file:line:column`) and what to do about it."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class RecipeError(VlmTuneError):
    """A recipe that can't be run; carries every problem found, not only the first."""

    exit_code = EXIT_RECIPE

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


def check_count(option: str, count: int | None) -> None:
    """Raises `RecipeError`, naming the option, unless `count` is an integer from 1 on, or None."""
    if count is None:
        return
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise RecipeError([Problem(option, f"expected a positive integer, got {quoted(count)}")])


def check_counts(**counts: int | None) -> None:
    """Raises as `check_count` for each count, whose keyword is its option's name."""
    for name, count in counts.items():
        check_count(f"--{name.replace('_', '-')}", count)


def is_finite(number: float) -> bool:
    """Returns whether a number is finite as a float; integers beyond its range are not."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def number_problems(option: str, number: float | None) -> list[Problem]:
    """Returns a problem, naming the option, unless `number` is finite and above 0, or None."""
    valid = isinstance(number, int | float) and not isinstance(number, bool)
    if number is None or (valid and is_finite(number) and number > 0):
        return []
    return [Problem(option, f"expected a number above 0, got {quoted(number)}")]


class ArgumentError(VlmTuneError, ValueError):
    """An argument of a Python call that can't be used; names it and what was expected."""

    exit_code = EXIT_RECIPE


class DataError(VlmTuneError):
    """A row, an image or a template that can't be used; names the source and the row.

    The message may quote a row, so every character in it that does not print is escaped.

    Args:
        message: the fault.
        source: the name of the row's source.
        row: the row's number or name.
        kind: the kind of fault, by which reports count.
        content: the row as it was read, for the quarantine file.
        file: the image or video file at fault; prepared data goes out of date when it changes.
    """

    exit_code = EXIT_DATA

    def __init__(
        self,
        message: str,
        *,
        source: str = "",
        row: int | str | None = None,
        kind: str = "row",
        content: object = None,
        file: Path | None = None,
    ) -> None:
        self.source = escaped(source)
        self.row = escaped(row) if isinstance(row, str) else row
        self.message = "\n".join(map(escaped, message.split("\n")))
        self.kind = kind
        self.content = content
        self.file = file
        row_place = "" if row is None else f"row {self.row}"
        place = ", ".join(part for part in (self.source, row_place) if part)
        super().__init__(f"{place}: {self.message}" if place else self.message)


class ModelError(VlmTuneError):
    """Weights or a model configuration that can't be used."""

    exit_code = EXIT_MODEL


class TrainingError(VlmTuneError):
    """Training stopped by itself (diverged, out of memory, locked folder).

    Args:
        message: the fault.
        by_recipe: whether the values of the recipe are to blame, as where memory runs out or the
            loss is not finite; other values may train.
    """

    exit_code = EXIT_TRAINING

    def __init__(self, message: str, *, by_recipe: bool = False) -> None:
        self.by_recipe = by_recipe
        super().__init__(message)


class Interrupted(VlmTuneError):
    """Training was stopped from outside; it saved a checkpoint and can be resumed."""

    exit_code = EXIT_INTERRUPTED
