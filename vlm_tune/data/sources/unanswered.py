"""Rows that may lack their last answer, to be answered: a placeholder is filled in and recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vlm_tune.data.sources.base import Chunk, Container, StoredRow
from vlm_tune.data.sources.chat_schemas import decoded_lists
from vlm_tune.data.sources.fields import MEDIA, REGIONS, is_empty, lettered
from vlm_tune.data.sources.legible import NULLS
from vlm_tune.errors import DataError

PLACEHOLDER = "(no answer is given)"
"""Replaces a missing answer while a row is read. No model sees it: the model answers instead."""
PLACEHOLDER_BOX = [0, 0, 1, 1]
"""The same for a missing box: the first pixel, which every image has."""


@dataclass
class QuestionRows:
    """A container whose rows get a placeholder for a missing answer.

    `unanswered` collects the (source, row) of such rows as they are read.
    """

    container: Container
    unanswered: set[tuple[str, int]] = field(default_factory=set)

    @property
    def name(self) -> str:
        """The container's name in messages."""
        return self.container.name

    def fingerprint(self) -> str:
        """The container's fingerprint."""
        return self.container.fingerprint()

    def chunks(self) -> Iterator[Chunk]:
        """The container's chunks."""
        return self.container.chunks()

    def rows(self, chunk: Chunk) -> Iterator[StoredRow]:
        """The chunk's rows, each with an answer or a placeholder."""
        for stored in self.container.rows(chunk):
            added = _missing(stored)
            if added:
                self.unanswered.add((stored.source, stored.number))
                stored = replace(stored, value={**stored.value, **added})
            yield stored


def _missing(stored: StoredRow) -> dict[str, Any]:
    """The fields that add an answer to a row without one; empty for a row that can't be read."""
    if not isinstance(stored.value, dict):
        return {}
    try:
        row = decoded_lists(
            {
                name: value
                for name, value in stored.value.items()
                if not isinstance(value, DataError)
            }
        )
    except DataError:  # the reader raises it again, with the row's number
        return {}
    if stored.untyped:
        row = {
            name: None if isinstance(value, str) and value.strip() in NULLS else value
            for name, value in row.items()
        }
    for name, speaker, text, answers in (
        ("messages", "role", "content", ("assistant",)),
        ("conversations", "role", "content", ("assistant",)),
        ("conversations", "from", "value", ("gpt", "assistant", "function_call")),
    ):
        turns = row.get(name)
        if (
            isinstance(turns, list)
            and turns
            and isinstance(last := turns[-1], Mapping)
            and speaker in last
        ):
            return (
                {}
                if last[speaker] in answers
                else {name: [*turns, {speaker: answers[0], text: PLACEHOLDER}]}
            )
    texts = row.get("texts")
    if isinstance(texts, list) and texts and isinstance(texts[-1], Mapping) and "user" in texts[-1]:
        whole = not is_empty(texts[-1].get("assistant"))
        return {} if whole else {"texts": [*texts[:-1], {**texts[-1], "assistant": PLACEHOLDER}]}
    return _missing_field(row)


def _missing_field(row: Mapping[str, Any]) -> dict[str, Any]:
    """As `_missing`, for the fields of a row of a task."""
    has = {name for name, value in row.items() if not is_empty(value)}
    choices = next(
        (
            row[name]
            for name in ("choices", "options", "candidates")
            if isinstance(row.get(name), list) and row[name]
        ),
        None,
    )
    if "chosen" in has:
        return {}
    if "question" in has:
        if has & {"answer", "answers", "label"}:
            return {}
        return {"answer": choices[0] if choices else "A" if lettered(row) else PLACEHOLDER}
    for question, answer in (
        ("prompt", "completion"),
        ("instruction", "output"),
        ("target_language", "translation"),
    ):
        if question in has:
            return {} if answer in has else {answer: PLACEHOLDER}
    if "phrase" in has:
        return {} if has & REGIONS else {"box": PLACEHOLDER_BOX}
    if "candidates" in has:
        return {} if "answer" in has else {"answer": row["candidates"][0]}
    if "choices" in has:
        return {} if "label" in has else {"label": row["choices"][0]}
    if has & set(MEDIA) and not has & {"caption", "text", "label"}:
        return {"caption": PLACEHOLDER}
    return {}
