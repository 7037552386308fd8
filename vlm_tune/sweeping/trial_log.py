"""The validation scores in the log of a trial's run, which may have been cut."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path

from vlm_tune.evaluation.registry import lower_is_better
from vlm_tune.events import Evaluation


def evaluations(run: Path, stage: int) -> list[Evaluation]:
    """The validations of a stage, by its number from 0, in the order of their steps."""
    names = {each.name for each in fields(Evaluation)}
    path = run / "log.jsonl"
    texts = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    validations = []
    for text in texts.splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # the process was killed as it wrote
            continue
        if line.get("event") == Evaluation.kind and line.get("stage") == stage:
            validations.append(Evaluation(**{key: line[key] for key in names & line.keys()}))
    return validations


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
