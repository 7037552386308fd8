"""The trace of a stage: a line for every optimizer step.

A replay is compared with it, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

NAME = "trace.jsonl"
DIGESTS = 1 << 48
"""Upper limit of digests, exclusive."""


@dataclass(frozen=True)
class Step:
    """One step: summed loss, gradient norm before clipping, digest of the samples that count.

    The digest is hexadecimal. A number that is not finite is stored as text; `norm` is None where
    the engine does not report it.
    """

    step: int
    loss: float | str
    norm: float | str | None
    samples: str


def json_number(value: float) -> float | str:
    """The number, or its text if JSON can't hold it (NaN, infinity)."""
    return value if math.isfinite(value) else str(value)


def digest(ids: Iterable[str]) -> int:
    """The sum of the first 48 bits of each id's sha256, modulo `DIGESTS`.

    The sum of the processes' digests, modulo `DIGESTS`, is that of all samples of a step, however
    these are divided among processes.
    """
    return (
        sum(int.from_bytes(hashlib.sha256(identity.encode()).digest()[:6]) for identity in ids)
        % DIGESTS
    )


def write_step(stage: Path, step: Step) -> None:
    """Appends a step to a stage's trace."""
    with (stage / NAME).open("a") as file:
        file.write(json.dumps(asdict(step)) + "\n")


def read_trace(stage: Path) -> list[Step]:
    """The steps of a stage; unreadable lines, as a killed process leaves them, are skipped."""
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
    """Removes the steps after `step` from the trace, because they will be done again."""
    steps = [entry for entry in read_trace(stage) if entry.step <= step]
    stage.mkdir(parents=True, exist_ok=True)
    (stage / NAME).write_text("".join(json.dumps(asdict(entry)) + "\n" for entry in steps))
