"""MMBench: multiple choice, right only if it is right in every rotation of the choices.

A copy is a TSV file with columns index, question, hint, A to D, answer, category, l2-category and
image (base64). Source: Liu et al. 2023, https://github.com/open-compass/MMBench; the answer's
letter is looked for as VLMEvalKit does it without a judge.
"""

from __future__ import annotations

import base64
import csv
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_tune.data.sources.fields import LETTERS
from vlm_tune.data.types import Conversation, Media, References
from vlm_tune.errors import DataError
from vlm_tune.evaluation.benchmarks.rows import Benchmark, lettered, of_form, question_row
from vlm_tune.evaluation.metric import Metric
from vlm_tune.evaluation.metrics import Answer
from vlm_tune.quoting import quoted

COPIES = 1_000_000
"""An index above it is a rotated copy of the row whose index is the remainder."""
EMPTY = ("", "nan")
MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
LETTER_WORDS = 3
"""The most words of an answer in which A is a letter; in a longer one it is taken as an article."""

Entry = dict[str, str]


def read(path: Path) -> list[Conversation]:
    """The rows of a copy, each question followed by its rotations.

    Those of a file that has rotated copies are taken, others are made. The sources are the values
    of `l2-category`. Raises `DataError` for what can't be used.
    """
    table = _table(path)
    images = {entry["index"]: entry["image"] for entry in table}
    questions: dict[int, list[tuple[int, Entry]]] = {}
    for number, entry in enumerate(table, 2):
        if not entry["index"].isdecimal():
            message = f"`index` must be an integer, got {quoted(entry['index'])}"
            raise DataError(message, source=str(path), row=number)
        questions.setdefault(int(entry["index"]) % COPIES, []).append((number, entry))
    rows = []
    for question, entries in questions.items():
        for turn, (number, entry, choices, chosen) in enumerate(_passes(entries, path)):
            row = question_row(
                _image(entry, images, path, number),
                lettered(_question(entry), choices),
                LETTERS[chosen],
                row_id=f"{question}:{turn}",
                source=path,
                row=number,
                part=entry.get("l2-category") or path.stem,
                references=References("mmbench", (), choices, chosen),
                category=entry.get("category") or "",
            )
            rows.append(row)
    return rows


def _table(path: Path) -> list[Entry]:
    csv.field_size_limit(1 << 30)  # an image is one field
    try:
        with path.open(encoding="utf-8", newline="") as file:
            table: list[Any] = list(csv.DictReader(file, delimiter="\t", restval=""))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"can't be read as TSV: {error}", source=str(path)) from None
    needed = ("index", "question", "A", "B", "answer", "image")
    missing = [name for name in needed if not table or name not in table[0]]
    if missing:
        raise DataError(f"has no rows with {', '.join(missing)}", source=str(path))
    return table


def _passes(
    entries: Sequence[tuple[int, Entry]], path: Path
) -> Iterator[tuple[int, Entry, tuple[str, ...], int]]:
    """The passes of a question: its place in the file, its entry, choices and right choice.

    The first choice moves to the end from one pass to the next, as many times as there are choices;
    a question that has copies of its own in the file has those.
    """
    for number, entry in entries:
        given = [entry.get(letter, "").strip() for letter in "ABCDE"]
        choices = tuple(itertools.takewhile(lambda text: text.lower() not in EMPTY, given))
        answer = entry["answer"].strip()
        chosen = LETTERS.find(answer) if len(answer) == 1 else -1
        if not 0 <= chosen < len(choices):
            message = f"`answer` {quoted(entry['answer'])} is the letter of none of the choices"
            raise DataError(message, source=str(path), row=number)
        for turn in range(len(choices) if len(entries) == 1 else 1):
            rotated = (*choices[turn:], *choices[:turn])
            yield number, entry, rotated, (chosen - turn) % len(choices)


def _question(entry: Entry) -> str:
    hint = entry.get("hint", "").strip()
    question = entry["question"].strip()
    return question if hint.lower() in EMPTY else f"{hint}\n{question}"


def _image(entry: Entry, images: Mapping[str, str], path: Path, row: int) -> Media:
    """The image of an entry, or that of the entry whose index stands in its place."""
    text = images.get(entry["image"], entry["image"])
    try:
        return Media(base64.b64decode(text, validate=True), label=f"the image of {entry['index']}")
    except ValueError as error:  # characters outside of ASCII too
        message = f"`image` is no base64: {error}"
        raise DataError(message, source=str(path), row=row) from None


# --- rules ----------------------------------------------------------------------------------------


def chosen_place(text: str, choices: Sequence[str]) -> int | None:
    """The place of the choice that an answer names; None where it names none or several.

    It is the only letter among its words (not the word A in a longer text), or else the only choice
    whose text it contains.
    """
    words = text.translate(MARKS).split()
    letters = [place for place in range(len(choices)) if LETTERS[place] in words]
    article = "A" in words and len(words) > LETTER_WORDS
    if len(letters) == 1 and not article:
        return letters[0]
    if len(text) > 2 * sum(map(len, choices)):
        return None
    named = [place for place, choice in enumerate(choices) if choice.lower() in text.lower()]
    return named[0] if len(named) == 1 else None


def _right(answer: Answer) -> bool:
    references = answer.references
    return chosen_place(answer.generated, references.choices) == references.chosen


def _circular(answers: Sequence[Answer]) -> np.ndarray:
    """Statistics (question is right in every pass, 1), at the first pass of each question."""
    passes: dict[str, list[int]] = {}
    for row, answer in enumerate(answers):
        passes.setdefault(answer.id.partition(":")[0], []).append(row)
    statistics = np.zeros((len(answers), 2))
    for rows in passes.values():
        statistics[rows[0]] = all(_right(answers[row]) for row in rows), 1
    return statistics


def _first(answers: Sequence[Answer]) -> np.ndarray:
    """Statistics (answer is right, 1) of the first pass of each question."""
    return np.array(
        [[_right(answer), 1] if answer.id.endswith(":0") else [0, 0] for answer in answers],
        dtype=np.float64,
    )


MMBENCH = Benchmark(
    "mmbench",
    read,
    tuple(
        Metric(
            f"mmbench_{name}",
            f"MMBench {title}",
            statistics,
            applies=of_form("mmbench"),
            needs="the form of MMBench's rows",
        )
        for name, title, statistics in (
            ("circular", "accuracy (circular)", _circular),
            ("vanilla", "accuracy (first pass)", _first),
        )
    ),
)
