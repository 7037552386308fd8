"""Forms of rows that hold a task's fields; an instruction set makes conversations of them."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vlm_tune.data.chat.draws import draw
from vlm_tune.data.sources.fields import CHOICES, LETTERS, REGIONS, is_empty, lettered
from vlm_tune.data.sources.legible import is_legible
from vlm_tune.data.sources.region_fields import escaped_regions, region_marks
from vlm_tune.errors import DataError
from vlm_tune.quoting import quoted

Row = Mapping[str, Any]

LETTER = re.compile(r"\(?([A-Za-z])[).:]?")
"""An answer that names a choice by its letter: `B`, `b`, `(B)`, `B.`."""


@dataclass(frozen=True)
class TaskFields:
    """A task row as its instruction set and its scores take it.

    Attributes:
        values: the fields of the instruction set.
        alternatives: for a row with several reference answers, the values that each one changes.
        choices: the choices in the order in which they are shown.
        chosen: the place of the right one among them.
    """

    values: dict[str, str]
    alternatives: tuple[dict[str, str], ...] = ()
    choices: tuple[str, ...] = ()
    chosen: int | None = None


class ClassName(str):
    """A class name from the data set's own features: text, even if it looks like a number."""


@dataclass(frozen=True)
class TaskOptions:
    """Options of reading a source's task rows.

    Attributes:
        booleans: the texts of false and true.
        answer_is: how an answer names a choice.
        shuffle_seed: choices are shuffled by (`shuffle_seed`, row id); not shuffled if None.
    """

    booleans: tuple[str, str] = ("no", "yes")
    answer_is: Literal["auto", "index", "index_from_1", "letter", "text"] = "auto"
    shuffle_seed: int | None = None


# --- values ---------------------------------------------------------------------------------------


def _text(row: Row, field: str, options: TaskOptions) -> str:
    """A field's text; numbers are formatted, booleans replaced by the configured texts."""
    return _plain(row.get(field), field, options)


def _plain(value: Any, field: str, options: TaskOptions) -> str:
    if isinstance(value, bool):
        return options.booleans[value]
    if isinstance(value, int | float):
        if value - value != 0:  # infinite or NaN
            raise DataError(f"`{field}` is {value}, which is no value", kind="missing_field")
        return str(value)
    if not isinstance(value, str) or not is_legible(value):
        received = "" if value is None or value == "" else f", got {quoted(value)}"
        raise DataError(f"no text `{field}`{received}", kind="missing_field")
    return value


def _texts(row: Row, field: str, options: TaskOptions) -> list[str]:
    values = row.get(field)
    if not isinstance(values, list) or not values:
        raise DataError(
            f"no list `{field}`" + ("" if values is None else f", got {quoted(values)}"),
            kind="missing_field",
        )
    return [_plain(value, field, options) for value in values]


# --- choices --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choices:
    """The choices of a row.

    Attributes:
        field: the field or columns that hold them.
        texts: their texts.
        labels: the row's own names for them, if it has any.
        letters: whether they are shown with letters.
    """

    field: str
    texts: list[str]
    labels: list[str] | None = None
    letters: bool = True


def _question_choices(row: Row, options: TaskOptions) -> Choices:
    """The choices of a multiple-choice row.

    They are a list, {"A": text}, {"label": [...], "text": [...]}, or columns A, B, ... Raises
    `DataError` for anything else and for fewer than 2 choices or more than the alphabet has.
    """
    fields = [name for name in CHOICES if not is_empty(row.get(name))]
    letters = lettered(row)
    if len(fields) + bool(letters) > 1:
        raise DataError(f"several lists of choices: {', '.join([*fields, *letters])}", kind="field")
    if letters:
        if letters != list(LETTERS[: len(letters)]):
            raise DataError(
                f"choices {', '.join(letters)}: a letter between them is empty",
                kind="missing_field",
            )
        return Choices(", ".join(letters), [_text(row, letter, options) for letter in letters])
    if not fields:
        raise DataError(
            f"no list of choices ({', '.join(CHOICES)}, or columns A, B, ...)", kind="missing_field"
        )
    (field,) = fields
    value = row[field]
    labels = None
    if isinstance(value, Mapping):
        if isinstance(value.get("text"), list) and isinstance(value.get("label"), list):
            value, labels = value["text"], [str(label) for label in value["label"]]
        else:
            labelled = {str(key): inner for key, inner in value.items() if inner is not None}
            value = list(labelled.values())
            labels = list(labelled)
    if not isinstance(value, list) or (labels is not None and len(labels) != len(value)):
        raise DataError(
            f"`{field}` must be a list of choices, got {quoted(row[field])}", kind="field"
        )
    if not 2 <= len(value) <= len(LETTERS):
        raise DataError(
            f"`{field}` has {len(value)} choices; a question has 2 to {len(LETTERS)}", kind="field"
        )
    return Choices(field, [_plain(text, field, options) for text in value], labels)


def _chosen(row: Row, field: str, choices: Choices, options: TaskOptions) -> int:
    """The index (from 0) of the choice that a field names by text, letter, label or place.

    Raises `DataError` for a value that names no choice, and for an ambiguous one, which names
    different choices by different readings.
    """
    value = row.get(field)
    if is_empty(value) and not isinstance(value, bool):
        raise DataError(f"no `{field}`", kind="missing_field")
    readings = _readings(value, choices, options)
    wanted = options.answer_is
    if wanted != "auto":
        readings = {
            how: places
            for how, places in readings.items()
            if how == wanted or (wanted == "letter" and how == "label")
        }
    elif isinstance(value, ClassName):
        readings = {"text": readings["text"]}
    elif readings["label"]:
        # The row has its own labels of the choices.
        readings = {"label": readings["label"], "text": readings["text"]}
    else:
        readings.pop("index_from_1")
        if not choices.letters:
            readings.pop("letter")
    places = {place for named in readings.values() for place in named}
    count = len(choices.texts)
    if not places:
        auto = "text, letter or place from 0" if choices.letters else "text or place from 0"
        what = {"auto": auto, "index": "place from 0", "index_from_1": "place from 1"}.get(
            wanted, wanted
        )
        called = choices.field if choices.field in CHOICES else "choices"
        message = f"`{field}` {quoted(value)} is not one of the {count} {called} by {what}"
        raise DataError(f"{message} (set the source's `answer_is`)", kind="field")
    if len(places) > 1:
        ways = ", ".join(
            f"choice {place + 1} by its {how}" for how, named in readings.items() for place in named
        )
        raise DataError(
            f"`{field}` {quoted(value)} may be {ways}: "
            "say what it is with the source's `answer_is` (index, index_from_1, letter or text)",
            kind="ambiguous",
        )
    return places.pop()


def _readings(value: Any, choices: Choices, options: TaskOptions) -> dict[str, list[int]]:
    """The indices of the choices that a value names, for each way to read it."""
    text = value.strip() if isinstance(value, str) else None
    number = value if isinstance(value, int) and not isinstance(value, bool) else None
    if isinstance(value, float) and value.is_integer():
        number = int(value)
    if text is not None and re.fullmatch(r"[0-9]{1,9}", text):
        number = int(text)
    spelled = (
        {text} if text is not None else {str(value), str(number)} if number is not None else set()
    )
    if isinstance(value, bool):
        spelled = {options.booleans[value], str(value)}
    stripped = [choice.strip() for choice in choices.texts]
    exact = [place for place, choice in enumerate(stripped) if choice in spelled]
    folded = {each.casefold() for each in spelled if each is not None}
    letter = LETTER.fullmatch(text) if text else None
    count = len(stripped)
    place = LETTERS.index(letter[1].upper()) if letter else count
    return {
        "label": [place for place, label in enumerate(choices.labels or []) if label in spelled],
        "text": exact
        or [place for place, choice in enumerate(stripped) if choice.casefold() in folded],
        "letter": [place] if place < count and choices.labels is None else [],
        "index": [number] if number is not None and 0 <= number < count else [],
        "index_from_1": [number - 1] if number is not None and 1 <= number <= count else [],
    }


def _order(count: int, row_id: str, options: TaskOptions) -> list[int]:
    """The order in which choices are shown: as stored, or shuffled by (seed, row id)."""
    order = list(range(count))
    if options.shuffle_seed is not None:
        random.Random(draw(options.shuffle_seed, f"choices:{row_id}")).shuffle(order)
    return order


# --- the forms ------------------------------------------------------------------------------------


def vqa(row: Row, row_id: str, options: TaskOptions) -> TaskFields:
    """`question` and `answer`, with an optional `context` before the question.

    Of several `answers`, texts or {"answer": ...}, the most common is the answer to train on, and
    all are references of scores.
    """
    question = _question(row, options)
    if row.get("answer") is not None or not row.get("answers"):
        answer = _text(row, "answer", options)
        several = _legible(row.get("answers"), options)
    else:
        answers = row["answers"]
        if not isinstance(answers, list):
            raise DataError(f"`answers` must be a list, got {quoted(answers)}", kind="field")
        several = [_plain(_answer_of(each), "answers", options) for each in answers]
        answer = Counter(several).most_common(1)[0][0]
    values = {"question": question, "answer": answer}
    return TaskFields(values, tuple({"answer": text} for text in several))


def _answer_of(entry: Any) -> Any:
    """An entry of `answers`: the text itself, or the one in {"answer": ...}."""
    return entry.get("answer") if isinstance(entry, Mapping) else entry


def _legible(entries: Any, options: TaskOptions) -> list[str]:
    """The texts of a list of further references, without entries that hold none."""
    texts = map(_answer_of, entries) if isinstance(entries, list) else ()
    return [
        _plain(text, "answers", options)
        for text in texts
        if (isinstance(text, str) and is_legible(text))
        or isinstance(text, int)
        or (isinstance(text, float) and math.isfinite(text))
    ]


def _question(row: Row, options: TaskOptions) -> str:
    question = _text(row, "question", options)
    return (
        question
        if is_empty(row.get("context"))
        else f"{_text(row, 'context', options)}\n{question}"
    )


def multiple_choice(row: Row, row_id: str, options: TaskOptions) -> TaskFields:
    """`question`, its choices and `answer` (or `label`).

    The choices are shown with letters, one per line.
    """
    fields = [
        name
        for name in ("answer", "label")
        if not is_empty(row.get(name)) or isinstance(row.get(name), bool)
    ]
    if len(fields) > 1:
        raise DataError("both `answer` and `label`", kind="field")
    choices = _question_choices(row, options)
    chosen = _chosen(row, fields[0] if fields else "answer", choices, options)
    if sum(text.strip() == choices.texts[chosen].strip() for text in choices.texts) > 1:
        raise DataError(
            f"the right choice {quoted(choices.texts[chosen])} comes twice in `{choices.field}`",
            kind="ambiguous",
        )
    order = _order(len(choices.texts), row_id, options)
    lines = [
        f"{letter}. {choices.texts[place]}" for letter, place in zip(LETTERS, order, strict=False)
    ]
    values = {
        "question": _question(row, options),
        "choices": "\n".join(lines),
        "letter": LETTERS[order.index(chosen)],
        "answer": choices.texts[chosen],
    }
    shown = tuple(choices.texts[place] for place in order)
    return TaskFields(values, choices=shown, chosen=order.index(chosen))


def caption(row: Row, row_id: str, options: TaskOptions) -> TaskFields:
    """`caption`; of a list of captions the first is trained on, and all are references."""
    value = row.get("caption")
    several = isinstance(value, list) and len(value) > 1
    first = _plain(value[0] if isinstance(value, list) and value else value, "caption", options)
    captions = _legible(value, options) if several else []
    return TaskFields({"caption": first}, tuple({"caption": text} for text in captions))


def match(row: Row, row_id: str, options: TaskOptions) -> TaskFields:
    """`caption`, which describes the image; the answers are those of `booleans`, true first."""
    no, yes = options.booleans
    values = {"caption": caption(row, row_id, options).values["caption"], "answer": yes}
    return TaskFields(values, choices=(yes, no), chosen=0)


def _one_of(
    row: Row, field: str, listed: str, row_id: str, options: TaskOptions
) -> tuple[Sequence[str], int]:
    """All choices in the order in which they are shown, and the place of the one that is named."""
    choices = Choices(listed, _texts(row, listed, options), letters=False)
    chosen = _chosen(row, field, choices, options)
    order = _order(len(choices.texts), row_id, options)
    return [choices.texts[place] for place in order], order.index(chosen)


def classify(row: Row, row_id: str, options: TaskOptions) -> TaskFields:
    """`label`, one of `choices` by text or place."""
    choices, chosen = _one_of(row, "label", "choices", row_id, options)
    values = {"choices": ", ".join(choices), "label": choices[chosen]}
    return TaskFields(values, choices=tuple(choices), chosen=chosen)


def retrieval(row: Row, row_id: str, options: TaskOptions) -> TaskFields:
    """`answer`, the one of `candidates` that fits the image, by text or place."""
    candidates, chosen = _one_of(row, "answer", "candidates", row_id, options)
    listed = "\n".join(f"- {text}" for text in candidates)
    values = {"candidates": listed, "answer": candidates[chosen]}
    return TaskFields(values, choices=tuple(candidates), chosen=chosen)


def ocr(row: Row, row_id: str, options: TaskOptions) -> TaskFields:
    """`text`, the text in the image."""
    return TaskFields({"text": _text(row, "text", options)})


def translate(row: Row, row_id: str, options: TaskOptions) -> TaskFields:
    """`translation` of the image's text, or of `text`, into `target_language`.

    `source_language` is optional.
    """
    values = {field: _text(row, field, options) for field in ("target_language", "translation")}
    return TaskFields(
        values
        | {
            field: _text(row, field, options)
            for field in ("text", "source_language")
            if row.get(field) not in (None, "")
        }
    )


def grounding(row: Row, row_id: str, options: TaskOptions) -> TaskFields:
    """`phrase`, and the boxes and points of what it names."""
    marks = region_marks(row)
    if not marks:
        raise DataError(f"no box or point ({', '.join(sorted(REGIONS))})", kind="missing_field")
    phrase = escaped_regions(_text(row, "phrase", options))
    return TaskFields({"phrase": phrase, "region": ", ".join(marks)})


TASK_FORMS: dict[str, Callable[[Row, str, TaskOptions], TaskFields]] = {
    "vqa": vqa,
    "multiple_choice": multiple_choice,
    "caption": caption,
    "match": match,
    "classify": classify,
    "retrieval": retrieval,
    "ocr": ocr,
    "translate": translate,
    "grounding": grounding,
}
