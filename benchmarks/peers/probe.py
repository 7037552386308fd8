"""What every peer's script measures in the same way; runs in the peer's environment.

A script takes one JSON argument: material (folder), rows, batch, precision, checkpointing (None: the peer's default),
steps, threads. It prints one line: {"steps": [{"seconds", "questions", "tokens", "supervised", "padded"}], "answers"}.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
IGNORED = -100


def arguments() -> dict[str, Any]:
    """The run that is asked for."""
    return json.loads(sys.argv[1])


def read_rows(asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows {"messages", "images"} of the form asked for, image paths made absolute."""
    folder = Path(asked["material"])
    rows = [json.loads(line) for line in (folder / f"{asked['rows']}.jsonl").read_text().splitlines()]
    return [{**row, "images": [str(folder / name) for name in row["images"]]} for row in rows]


def spans(labels: list[list[int]]) -> list[list[int]]:
    """The runs of supervised ids of every row: an answer each."""
    found: list[list[int]] = []
    for row in labels:
        before = IGNORED
        for label in row:
            if label != IGNORED:
                if before == IGNORED:
                    found.append([])
                found[-1].append(label)
            before = label
    return found


class Counted:
    """A collator that notes what is in the batches it makes."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.batches: list[dict[str, int]] = []

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collator(rows)
        labels, mask = batch["labels"], batch["attention_mask"]
        supervised = int((labels != IGNORED).sum())
        questions = len(spans(labels.tolist()))
        self.batches.append({"questions": questions, "supervised": supervised, "tokens": int(mask.sum()), "padded": mask.numel()})
        return batch

    def answers(self, rows: list[Any], tokenizer: Any) -> list[str]:
        """The supervised texts of all rows, sorted: what is trained on."""
        found = [
            tokenizer.decode(ids, skip_special_tokens=True).strip()
            for row in rows
            for ids in spans(self.collator([row])["labels"].tolist())
        ]
        return sorted(found)


def clock(seconds: list[float]) -> Any:
    """A trainer callback that adds the seconds of each step, the work between steps included."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        last = 0.0

        def on_train_begin(self, *unused: Any, **named: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, *unused: Any, **named: Any) -> None:
            now = time.perf_counter()
            seconds.append(now - self.last)
            self.last = now

    return Clock()


def report(seconds: list[float], counted: Counted, answers: list[str]) -> None:
    """Prints the run; loaders may have made more batches than were trained on."""
    steps = [{"seconds": spent, **batch} for spent, batch in zip(seconds, counted.batches, strict=False)]
    print(json.dumps({"steps": steps, "answers": answers}))
