"""What every optimizer step did, a line each: by it a replay is compared with the run, bit for bit."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

NAME = "trace.jsonl"
DIGESTS = 1 << 48
"""Digests are smaller than this."""


@dataclass(frozen=True)
class Step:
    """One step: the summed loss, the gradients' norm before clipping, and a digest of the samples that count, in hexadecimal.

    A value that is not finite is kept as text; `norm` is None where the engine does not tell it.
    """

    step: int
    loss: float | str
    norm: float | str | None
    samples: str


def told(value: float) -> float | str:
    """A number as JSON can hold it."""
    return value if math.isfinite(value) else str(value)


def digest(ids: Iterable[str]) -> int:
    """The sum of 48 bits of each id's sha256: that of all samples of a step however processes share them out, if theirs are added."""
    return (
        sum(int.from_bytes(hashlib.sha256(identity.encode()).digest()[:6]) for identity in ids)
        % DIGESTS
    )


def write_step(stage: Path, step: Step) -> None:
    """Adds a step to a stage's trace."""
    with (stage / NAME).open("a") as file:
        file.write(json.dumps(asdict(step)) + "\n")


def read_trace(stage: Path) -> list[Step]:
    """A stage's steps; a line that can't be read, as a killed process leaves it, is passed over."""
    path = stage / NAME
    steps = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            step = Step(**json.loads(line))
        except (ValueError, TypeError):
            continue
        if isinstance(step.step, int):
            steps.append(step)
    return steps


def cut_trace(stage: Path, step: int) -> None:
    """Forgets what was done after a step, because it is done again."""
    kept = [found for found in read_trace(stage) if found.step <= step]
    stage.mkdir(parents=True, exist_ok=True)
    (stage / NAME).write_text("".join(json.dumps(asdict(found)) + "\n" for found in kept))
