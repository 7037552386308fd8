"""Measurements that the training scripts of all peers share; runs in the peer's environment.

A script takes one JSON argument, the request for a run, with these keys:

- material: folder of the models and rows;
- rows, batch, precision, checkpointing: settings of the sweep (None: the peer's default);
- steps: number of steps;
- warm: how many of them are a warm-up, which is not counted;
- seconds: no further step begins after these, once two are measured;
- threads: of torch;
- cpu_time: measure the process's own time, not the clock's;
- check: report the answers that all rows are trained on.

It prints one line: {"steps": [...], "answers"}.
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
    """The request for the run, from the command line."""
    return json.loads(sys.argv[1])


def read_rows(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows {"messages", "images"} of the request's row form, with absolute image paths."""
    folder = Path(request["material"])
    rows = [
        json.loads(line) for line in (folder / f"{request['rows']}.jsonl").read_text().splitlines()
    ]
    return [{**row, "images": [str(folder / name) for name in row["images"]]} for row in rows]


def spans(labels: list[list[int]]) -> list[list[int]]:
    """The unbroken spans of supervised ids in all rows; each span is an answer."""
    answers: list[list[int]] = []
    for row in labels:
        before = IGNORED
        for label in row:
            if label != IGNORED:
                if before == IGNORED:
                    answers.append([])
                answers[-1].append(label)
            before = label
    return answers


def counts(labels: list[list[int]], mask: list[list[int]], seq2seq: bool) -> dict[str, int]:
    """Counts of a batch: questions, tokens and attended pairs.

    Args:
        labels: Labels by row, `IGNORED` where there is no loss.
        mask: Attention mask of the input by row, 1 for a token and 0 for padding.
        seq2seq: The model is an encoder-decoder.

    Returns:
        "questions"; "supervised", tokens with a loss; "tokens", input tokens without padding;
        "padded", input tokens with padding; "labels", the decoder's tokens (0 for a causal model);
        "read_pairs", attended pairs of the input; "written_pairs", attended pairs of an
        encoder-decoder's decoder, with itself and with the encoder.
    """
    input_lengths = [sum(row) for row in mask]
    padded = sum(map(len, mask))
    label_counts = [sum(label != IGNORED for label in row) for row in labels]
    amounts = {
        "questions": len(spans(labels)),
        "supervised": sum(label_counts),
        "tokens": sum(input_lengths),
        "padded": padded,
    }
    if not seq2seq:
        return {
            **amounts,
            "labels": 0,
            "read_pairs": sum(length * (length + 1) // 2 for length in input_lengths),
            "written_pairs": 0,
        }
    written = sum(
        count * (count + 1) // 2 + count * length
        for count, length in zip(label_counts, input_lengths, strict=True)
    )
    return {
        **amounts,
        "labels": sum(label_counts),
        "read_pairs": sum(length**2 for length in input_lengths),
        "written_pairs": written,
    }


class Counted:
    """A collator that records the counts of its batches in `batches`."""

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

    def answers(self, request: dict[str, Any], rows: Any, tokenizer: Any) -> list[str] | None:
        """The supervised texts of all rows, sorted; None unless the request has `check`."""
        if not request["check"]:
            return None
        answers = [
            tokenizer.decode(ids, skip_special_tokens=True).strip()
            for place in range(len(rows))
            for ids in spans(self.collator([rows[place]])["labels"].tolist())
        ]
        return sorted(answers)


@dataclass
class Times:
    """Seconds of each step.

    Attributes:
        steps: Seconds of each step, with the work between steps.
        waited: Of these, the seconds before the step's batch was ready.
    """

    steps: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)


def clock(request: dict[str, Any], times: Times) -> Any:
    """A trainer callback that records the times and ends training when the time is up."""
    from transformers import TrainerCallback

    now = time.process_time if request["cpu_time"] else time.perf_counter

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
            measured = times.steps[request["warm"] :]
            if len(measured) >= 2 and sum(measured) >= request["seconds"]:
                control.should_training_stop = True

    return Clock()


def report(times: Times, counted: Counted, answers: list[str] | None) -> None:
    """Prints the run's JSON line.

    Loaders may have prepared more batches than were trained on; those are left out.
    """
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
