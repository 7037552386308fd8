"""The validation scores in the log of a trial's run."""

from __future__ import annotations

import json
import math
from pathlib import Path

from vlm_tune.events import Evaluation, Note
from vlm_tune.sweeping.trial_log import best_evaluation, evaluations


def scored(step: int, accuracy: float, loss: float = 1.0, stage: int = 1) -> Evaluation:
    return Evaluation(step=step, accuracy=accuracy, n=4, loss=loss, stage=stage, name="main")


def test_a_cut_log_has_the_scores_of_its_whole_lines(tmp_path: Path) -> None:
    assert evaluations(tmp_path, 1) == []
    first, second = scored(2, 0.5), scored(4, 0.25)
    events = [Note("a text"), scored(9, 1.0, stage=0), first, second]
    lines = [json.dumps(event.line() | {"time": 1.0}) for event in events]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, lines[-1][:20]]))
    assert evaluations(tmp_path, 1) == [first, second]


def test_the_last_of_equal_scores_is_the_best_and_none_that_is_not_finite() -> None:
    diverged = scored(6, 0.9, loss=math.nan)
    validations = [scored(2, 0.5), scored(4, 0.5), scored(5, 0.25), diverged]
    assert best_evaluation(validations) == validations[1]
    assert best_evaluation([diverged]) is None
    losses = [Evaluation(step=n, accuracy=0, n=4, loss=1 / n, best_by="loss") for n in (1, 2)]
    assert best_evaluation(losses) == losses[1]
