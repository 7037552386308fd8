"""Files, images and rows with one question: helpers of the readers of public benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_tune.data.sources.fields import LETTERS
from vlm_tune.data.types import Conversation, Media, Message, References
from vlm_tune.errors import DataError
from vlm_tune.evaluation.metric import Metric
from vlm_tune.evaluation.metrics import Answer
from vlm_tune.paths import is_file
from vlm_tune.quoting import quoted, reason_of

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
"""The ends of prompts in LLaVA-1.5's evaluations, with which most published scores are made."""


@dataclass(frozen=True)
class Benchmark:
    """A public benchmark.

    Attributes:
        name: its name on the command line; also the form of its rows.
        read: the rows of a local copy, in a folder or a file. Raises `DataError`.
        metrics: its rules.
    """

    name: str
    read: Callable[[Path], list[Conversation]]
    metrics: tuple[Metric, ...]


def of_form(name: str) -> Callable[[Answer], bool]:
    """Whether an answer is to a row of a benchmark."""
    return lambda answer: answer.references.form == name


def read_text(path: Path) -> str:
    """The text of a file. Raises `DataError` where it can't be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"can't be read: {reason_of(error)}", source=str(path)) from None


def parse_json(text: str, path: Path, row: int | None = None) -> Any:
    """The value of JSON text. Raises `DataError` where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        message = f"can't be read as JSON: {error}"
        raise DataError(message, source=str(path), row=row) from None


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises `DataError` where it can't be read."""
    return parse_json(read_text(path), path)


def field(entry: Any, names: Sequence[str], source: Path, row: int) -> Any:
    """The first of some fields that an entry has. Raises `DataError` where it has none of them."""
    if isinstance(entry, dict):
        for name in names:
            if entry.get(name) is not None:
                return entry[name]
    raise DataError(
        f"expected an object with `{'` or `'.join(names)}`, got {quoted(entry)}",
        source=str(source),
        row=row,
    )


def list_field(entry: Any, name: str, source: Path, row: int) -> list[Any]:
    """A field that is a list. Raises `DataError` where it is not there, empty or something else."""
    listed = field(entry, [name], source, row)
    if not isinstance(listed, list) or not listed:
        message = f"`{name}` must be a non-empty list, got {quoted(listed)}"
        raise DataError(message, source=str(source), row=row)
    return listed


def check_folder(folder: Path, expected: str) -> None:
    """Raises `DataError` for a path that is no folder."""
    if not folder.is_dir():
        raise DataError(f"no such folder; expected one with {expected}", source=str(folder))


def find_image(folder: Path, name: str, places: Sequence[str]) -> Media:
    """The image of a name in one of a folder's subfolders. Raises `DataError` where it is not."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"the image {quoted(name)} lies outside of the copy", source=str(folder))
    for place in places:
        path = folder / place / name
        if is_file(path):
            return Media(path)
    shown = ", ".join(place or "." for place in places)
    raise DataError(f"the image {quoted(name)} is in none of {shown}", source=str(folder))


def question_row(
    image: Media | None,
    prompt: str,
    answer: str,
    *,
    row_id: str,
    source: Path,
    row: int,
    part: str,
    references: References,
    category: str = "",
) -> Conversation:
    """A row that asks one question about at most one image.

    `part` is what it is scored together with, besides its category: a split, or an ability.
    """
    parts = (prompt,) if image is None else (image, prompt)
    return Conversation(
        id=row_id,
        messages=(Message("user", parts), Message("assistant", (answer,))),
        category=category,
        source=str(source),
        row=row,
        source_name=part,
        references=references,
    )


def lettered(question: str, choices: Sequence[str]) -> str:
    """A question with its choices, a line each, and the request for a letter."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([question, *lines, LETTER])
