"""What a row can look like when it holds a task's fields: a prompt set makes the conversation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from vlm_tune.errors import DataError

Row = Mapping[str, Any]


def _text(row: Row, field: str) -> str:
    """A field's text; numbers are written out."""
    return _plain(row.get(field), field)


def _plain(value: Any, field: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"no text `{field}`" + ("" if value is None or value == "" else f", got {value!r:.100}"), kind="missing_field")
    return value


def _texts(row: Row, field: str) -> list[str]:
    values = row.get(field)
    if not isinstance(values, list) or not values:
        raise DataError(f"no list `{field}`", kind="missing_field")
    return [_plain(value, field) for value in values]


def _one_of(row: Row, field: str, options: list[str], called: str) -> str:
    """The option that a field names, by its text or by its place from 0."""
    value = row.get(field)
    if isinstance(value, str) and value in options:
        return value
    place = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 9 else value
    if isinstance(place, int) and not isinstance(place, bool) and 0 <= place < len(options):
        return options[place]
    raise DataError(f"`{field}` {value!r:.100} is none of the {len(options)} {called} and no place among them", kind="field")


def vqa(row: Row) -> dict[str, str]:
    """`question` and `answer`; of several `answers`, texts or {"answer": ...}, the most common."""
    question = _text(row, "question")
    if row.get("answer") is not None or not row.get("answers"):
        return {"question": question, "answer": _text(row, "answer")}
    answers = row["answers"]
    if not isinstance(answers, list):
        raise DataError(f"`answers` is a list, got {type(answers).__name__}", kind="field")
    said = [_plain(given.get("answer") if isinstance(given, Mapping) else given, "answers") for given in answers]
    return {"question": question, "answer": Counter(said).most_common(1)[0][0]}


def caption(row: Row) -> dict[str, str]:
    """`caption`; of a list of captions, the first."""
    value = row.get("caption")
    return {"caption": _plain(value[0] if isinstance(value, list) and value else value, "caption")}


def classify(row: Row) -> dict[str, str]:
    """`label` out of `choices`, by its text or its place."""
    choices = _texts(row, "choices")
    return {"choices": ", ".join(choices), "label": _one_of(row, "label", choices, "choices")}


def retrieval(row: Row) -> dict[str, str]:
    """`answer`, the one of the `candidates` that fits the image, by its text or its place."""
    candidates = _texts(row, "candidates")
    return {"candidates": "\n".join(f"- {text}" for text in candidates), "answer": _one_of(row, "answer", candidates, "candidates")}


def ocr(row: Row) -> dict[str, str]:
    """`text`, what is written in the image."""
    return {"text": _text(row, "text")}


def translate(row: Row) -> dict[str, str]:
    """`translation` into `target_language`, of the image's text or of `text`; `source_language` where known."""
    values = {field: _text(row, field) for field in ("target_language", "translation")}
    return values | {field: _text(row, field) for field in ("text", "source_language") if row.get(field) not in (None, "")}


TASK_FORMS: dict[str, Callable[[Row], dict[str, str]]] = {
    "vqa": vqa,
    "caption": caption,
    "classify": classify,
    "retrieval": retrieval,
    "ocr": ocr,
    "translate": translate,
}
