"""Scored answers in files, one JSON object a line; this module does not import torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from vlm_tune.data.types import References
from vlm_tune.errors import DataError
from vlm_tune.evaluation.metrics import Answer, Ranks
from vlm_tune.paths import replacing

ANSWERS_FILE = "answers.jsonl"
"""The test answers in a run's folder."""


def save_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Writes scored answers. A loss that is not finite, which JSON can't hold, is null."""
    with replacing(path) as written, written.open("w", encoding="utf-8") as file:
        for answer in answers:
            entry = asdict(answer)
            if not math.isfinite(answer.loss):
                entry["loss"] = None
            if answer.ranks is None:
                del entry["ranks"]
            if answer.modality == "image":
                del entry["modality"]
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def read_answers(run: Path) -> list[Answer]:
    """Reads a run's test answers. Raises `DataError` where there are none or a line is damaged."""
    path = run / ANSWERS_FILE
    if not path.is_file():
        raise DataError(
            f"has no {ANSWERS_FILE}, which a run writes once its test part is scored; "
            "to compare models on a file of rows give --data",
            source=str(run),
        )
    return load_answers(path)


def load_answers(path: Path) -> list[Answer]:
    """Reads a file of answers. Raises `DataError` where it has none or a line is damaged."""
    try:
        # Not splitlines(): JSON strings may hold U+2028 and others at which it splits.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"can't be read: {error}", source=str(path)) from None
    answers = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            answers.append(answer_from(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise DataError("is no scored answer", source=str(path), row=number) from None
    if not answers:
        raise DataError("holds no answers", source=str(path))
    return answers


def answer_from(entry: dict[str, Any]) -> Answer:
    """An answer from its JSON object. Raises `TypeError` or `KeyError` for another object."""
    references: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in (entry.get("references") or {}).items()
    }
    known = {field.name for field in fields(Answer)} - {"references", "images", "loss", "ranks"}
    images = entry.get("images", [entry["image"]] if entry["image"] else [])
    loss = entry.get("loss", 0.0)
    return Answer(
        **{name: value for name, value in entry.items() if name in known},
        images=tuple(images),
        references=References(**references),
        loss=math.nan if loss is None else float(loss),
        ranks=Ranks(**entry["ranks"]) if entry.get("ranks") else None,
    )
