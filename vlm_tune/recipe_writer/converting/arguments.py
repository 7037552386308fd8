"""The values of another framework's configuration, taken one by one: what is left was not used."""

from __future__ import annotations

import math
from typing import Any

from vlm_tune.errors import Problem, RecipeError
from vlm_tune.quoting import quoted
from vlm_tune.recipe_writer.written import Unmatched

NOTHING = ("", "none", "null", "no", "false")
"""Texts that stand for an empty value or a switch that is off, in any case."""


def is_nothing(value: Any) -> bool:
    """Whether a value is empty or off; 0 is a number."""
    if isinstance(value, str):
        return value.lower() in NOTHING
    return value is None or value is False or (isinstance(value, list | dict) and not value)


class Arguments:
    """Keys and values of a configuration.

    Values of a shell script are texts; those of YAML and JSON have types. Each method takes a key,
    so that it is not left over, and raises `RecipeError` for a value of another kind.
    """

    def __init__(self, place: str, values: dict[str, Any]) -> None:
        self._place = place
        self._left = {str(key): value for key, value in values.items()}
        self.unmatched: list[Unmatched] = []

    def __contains__(self, key: str) -> bool:
        return not is_nothing(self._left.get(key))

    def has(self, key: str) -> bool:
        """Whether the key is there, whatever its value; null is none."""
        return self._left.get(key) is not None

    def take(self, key: str) -> Any:
        """The value of any kind; None where it is missing, empty or off."""
        value = self._left.pop(key, None)
        return None if is_nothing(value) else value

    def text(self, *keys: str) -> str | None:
        """The text of the first of these keys that is there."""
        values = [(key, self.take(key)) for key in keys]
        for key, value in values:
            if isinstance(value, str | int | float):
                return str(value)
            if value is not None:
                raise self._wrong(key, "a text", value)
        return None

    def word(self, key: str) -> str | None:
        """A text in lower case, of a key for which none and false have meanings of their own."""
        value = self._left.pop(key, None)
        return None if value is None or value == "" else str(value).lower()

    def section(self, key: str) -> Arguments:
        """The keys and values under a key; none where it is missing."""
        value = self.take(key)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(key, "an object", value)
        return Arguments(f"{self._place}: {key}", value or {})

    def number(self, key: str) -> float | None:
        """A finite number."""
        value = self.take(key)
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise self._wrong(key, "a number", value) from None
        if not math.isfinite(number):
            raise self._wrong(key, "a number", value)
        return number

    def count(self, key: str) -> int | None:
        """A whole number; None also for one under 1."""
        number = self.number(key)
        if number is None or number < 1:
            return None
        if number != int(number):
            raise self._wrong(key, "an integer", number)
        return int(number)

    def flag(self, key: str, default: bool = False) -> bool:
        """Whether a switch is on; a flag of a script without a value is."""
        value = self._left.pop(key, None)
        if value is None:
            return default
        if str(value).lower() in ("true", "1", "yes", "on"):
            return True
        if str(value).lower() in ("false", "0", "no", "off", "none", ""):
            return False
        raise self._wrong(key, "true or false", value)

    def names(self, key: str) -> list[str]:
        """Names in a list, or in a text with commas or blanks between them."""
        value = self.take(key)
        if value is None:
            return []
        if isinstance(value, str):
            return value.replace(",", " ").split()
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            return [name for each in value for name in each.split(",") if name]
        raise self._wrong(key, "a name or a list of names", value)

    def numbers(self, key: str) -> list[float]:
        """Numbers in a list, or in a text with commas or blanks between them."""
        value = self.take(key)
        texts = value.replace(",", " ").split() if isinstance(value, str) else value or []
        try:
            return [float(each) for each in texts]
        except (TypeError, ValueError):
            raise self._wrong(key, "a list of numbers", value) from None

    def refuse(self, key: str, value: Any, reason: str) -> None:
        """Notes that a key has no counterpart."""
        self._left.pop(key, None)
        self.unmatched.append(Unmatched(key, value, reason))

    def unsupported(self, key: str, value: Any, reason: str) -> RecipeError:
        """The error of a value that makes the whole configuration one of no recipe."""
        return RecipeError([Problem(f"{self._place}: {key}", f"{quoted(value)}: {reason}")])

    def left(self) -> dict[str, Any]:
        """The keys that were not taken and whose values are neither empty, off nor 0."""
        return {
            key: value for key, value in self._left.items() if not is_nothing(value) and value != 0
        }

    def _wrong(self, key: str, expected: str, value: Any) -> RecipeError:
        message = f"expected {expected}, got {quoted(value)}"
        return RecipeError([Problem(f"{self._place}: {key}", message)])
