"""Answers to a file of rows, streamed to a JSONL file; nothing is scored."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlm_tune.data.batching.collate import Fetch
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.images.decode import PixelCache, image_size
from vlm_tune.data.types import Conversation
from vlm_tune.errors import DataError
from vlm_tune.generation.answering import prompt_answers
from vlm_tune.generation.answers import Answer
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.paths import writing

BLOCK = 16
"""Number of batches answered before writing, so that rows about one image may share its prefill."""


@dataclass(frozen=True)
class Predictions:
    """Summary of the answers written.

    Attributes:
        output: the file.
        n: its number of rows.
        answered: number of rows that had a reference answer.
        seconds: the time taken.
    """

    output: str
    n: int
    answered: int
    seconds: float

    def summary(self) -> dict[str, Any]:
        """The fields as a dictionary that JSON can hold."""
        return asdict(self)


def write_answers(
    model: VisionLanguageNetwork,
    rows: Sequence[Conversation],
    unanswered: set[tuple[str, int]],
    output: Path,
    *,
    decoding: Decoding,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Answers the last question of every row and writes one JSON object per line.

    Args:
        model: in evaluation mode.
        rows: conversations that end in an answer.
        unanswered: (source, row) of rows whose answer is a placeholder; their `expected` is null.
        output: the JSONL file: id, source, row, image, question, expected, answer, of a model that
            reasons `reasoning_content`, and where an answer about one image has boxes or points
            their `regions`, in pixels of that image.
        decoding: how answers are generated.
        batch_size: rows per batch.
        progress: called with the number of rows written and their total, also before the first.

    Raises:
        DataError: there are no rows, or a prompt is longer than the model accepts; the file is not
            touched then.
        RecipeError: the file can't be written.
    """
    if not rows:
        raise DataError("no rows to answer")
    started = time.perf_counter()
    rows = [model.processor.template.parted(row) for row in rows]
    prompts = model.processor.prompts(rows)
    fetch: Fetch = PixelCache(model.processor.images)
    size = BLOCK * batch_size
    with writing(output, "the file of answers"), output.open("w", encoding="utf-8") as file:
        for start in range(0, len(rows), size):
            if progress:
                progress(start, len(rows))
            answers = prompt_answers(
                model,
                prompts[start : start + size],
                decoding,
                fetch=fetch,
                cached=False,
                batch_size=batch_size,
            )
            for row, answer in zip(rows[start : start + size], answers, strict=True):
                file.write(
                    json.dumps(
                        _line(model.processor, row, answer, (row.source, row.row) in unanswered),
                        ensure_ascii=False,
                    )
                    + "\n"
                )
            file.flush()
    answered = len(rows) - sum((row.source, row.row) in unanswered for row in rows)
    return Predictions(str(output), len(rows), answered, round(time.perf_counter() - started, 2))


def _line(
    processor: Processor, row: Conversation, answer: Answer, unanswered: bool
) -> dict[str, Any]:
    alone = len(row.media) == 1 and row.media[0].modality == "image"
    regions = processor.grounding.read(answer.text, image_size(row.media[0])) if alone else []
    return {
        "id": row.id,
        "source": row.source,
        "row": row.row,
        "image": row.media[0].name if row.media else "",
        "question": row.question,
        "expected": None if unanswered else row.messages[-1].text.strip(),
        "answer": answer.text,
        **({} if answer.reasoning is None else {"reasoning_content": answer.reasoning}),
    } | ({"regions": [each.coordinates for each in regions]} if regions else {})
