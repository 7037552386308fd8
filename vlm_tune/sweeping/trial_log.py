"""The log of a trial's run, which may have been cut: its validation scores and its steps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from vlm_tune.evaluation.registry import lower_is_better
from vlm_tune.events import Evaluation


def evaluations(run: Path, stage: int) -> list[Evaluation]:
    """The validations of a stage, by its number from 0, in the order of their steps."""
    names = {each.name for each in fields(Evaluation)}
    return [
        Evaluation(**{key: line[key] for key in names & line.keys()})
        for line in _lines(run, stage)
        if line["event"] == Evaluation.kind
    ]


def best_evaluation(validations: list[Evaluation]) -> Evaluation | None:
    """The validation with the best score, the last of equal ones; None where none is finite."""
    best = None
    for each in validations:
        if each.score is None or not math.isfinite(each.score + (each.loss or 0.0)):
            continue
        sign = 1 if lower_is_better(each.best_by) else -1
        if best is None or best.score is None or sign * each.score <= sign * best.score:
            best = each
    return best


def last_step(run: Path, stage: int) -> int:
    """The last optimizer step of a stage that the log has; 0 where it has none."""
    return max((int(line.get("step", 0)) for line in _lines(run, stage)), default=0)


def _lines(run: Path, stage: int) -> Iterator[dict[str, Any]]:
    """Yields the log's events of training and validation of a stage."""
    path = run / "log.jsonl"
    if not path.is_file():
        return
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # the process was killed as it wrote
            continue
        if line.get("event") in ("train", Evaluation.kind) and line.get("stage") == stage:
            yield line
