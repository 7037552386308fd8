"""What every peer's script measures in the same way; runs in the peer's environment.

A script takes one JSON argument: material (folder), rows, batch, precision, checkpointing (None: the peer's default),
steps and warm (how many of them don't count), seconds (after which no further step begins once two are measured),
threads, cpu_time (seconds are the process's own, not the clock's), and check (whether to tell what all rows are trained
on). It prints one line: {"steps": [...], "answers"}.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
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
    rows = [
        json.loads(line) for line in (folder / f"{asked['rows']}.jsonl").read_text().splitlines()
    ]
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


def counts(labels: list[list[int]], mask: list[list[int]], seq2seq: bool) -> dict[str, int]:
    """What is in a batch: questions, tokens and attended pairs (of what is read, and of what an encoder-decoder writes)."""
    read = [sum(row) for row in mask]
    padded = sum(map(len, mask))
    said = [sum(label != IGNORED for label in row) for row in labels]
    found = {
        "questions": len(spans(labels)),
        "supervised": sum(said),
        "tokens": sum(read),
        "padded": padded,
    }
    if not seq2seq:
        return {
            **found,
            "labels": 0,
            "read_pairs": sum(length * (length + 1) // 2 for length in read),
            "written_pairs": 0,
        }
    written = sum(
        own * (own + 1) // 2 + own * length for own, length in zip(said, read, strict=True)
    )
    return {
        **found,
        "labels": sum(said),
        "read_pairs": sum(length**2 for length in read),
        "written_pairs": written,
    }


class Counted:
    """A collator that notes what is in the batches it makes."""

    def __init__(self, collator: Any, seq2seq: bool = False) -> None:
        self.collator = collator
        self.seq2seq = seq2seq
        self.batches: list[dict[str, int]] = []

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collator(rows)
        self.batches.append(
            counts(batch["labels"].tolist(), batch["attention_mask"].tolist(), self.seq2seq)
        )
        return batch

    def answers(self, asked: dict[str, Any], rows: Any, tokenizer: Any) -> list[str] | None:
        """The supervised texts of all rows, sorted: what is trained on. None where that is not asked for."""
        if not asked["check"]:
            return None
        found = [
            tokenizer.decode(ids, skip_special_tokens=True).strip()
            for place in range(len(rows))
            for ids in spans(self.collator([rows[place]])["labels"].tolist())
        ]
        return sorted(found)


@dataclass
class Times:
    """Seconds of each step, the work between steps included, and of them those before its batch was there."""

    steps: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)


def clock(asked: dict[str, Any], times: Times) -> Any:
    """A trainer callback that notes the times, and ends the training when the time is over."""
    from transformers import TrainerCallback

    now = time.process_time if asked["cpu_time"] else time.perf_counter

    class Clock(TrainerCallback):
        last = 0.0

        def on_train_begin(self, *unused: Any, **named: Any) -> None:
            self.last = now()

        def on_step_begin(self, *unused: Any, **named: Any) -> None:
            times.waited.append(now() - self.last)

        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            ended = now()
            times.steps.append(ended - self.last)
            self.last = ended
            measured = times.steps[asked["warm"] :]
            if len(measured) >= 2 and sum(measured) >= asked["seconds"]:
                control.should_training_stop = True

    return Clock()


def report(times: Times, counted: Counted, answers: list[str] | None) -> None:
    """Prints the run; loaders may have made more batches than were trained on."""
    triples = zip(times.steps, times.waited, counted.batches, strict=False)
    print(
        json.dumps(
            {
                "steps": [
                    {"seconds": spent, "waited": waited, **batch}
                    for spent, waited, batch in triples
                ],
                "answers": answers,
            }
        )
    )
