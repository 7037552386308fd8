"""The lines that events become in a run's log: their keys, in order, and what is left out."""

from __future__ import annotations

import json

import pytest

from vlm_tune.events import (
    Environment,
    Evaluation,
    Event,
    Features,
    Note,
    PeakMemory,
    StageStart,
    TrainSteps,
    Tuning,
)

TRAIN = TrainSteps(
    step=3,
    of=8,
    loss=0.5,
    questions_per_s=2.0,
    tokens_per_s=9.0,
    padding=0.25,
    stall=0.0,
    imbalance=1.0,
    learning_rate=0.001,
    left=7.0,
)
FIGURES = (
    '"loss": 0.5, "questions_per_s": 2.0, "tokens_per_s": 9.0, "padding": 0.25, "stall": 0.0, '
    '"imbalance": 1.0, "learning_rate": 0.001, "left": 7.0'
)


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (Note("a text"), '{"event": "note", "text": "a text"}'),
        (
            Note("a text", 3).of_stage(0, "main"),
            '{"event": "note", "text": "a text", "step": 3, "stage": 0, "name": "main"}',
        ),
        (Features(0, 5), '{"event": "features", "done": 0, "of": 5}'),
        (
            Environment({"cuda": None, "threads": 1}, "no AMX"),
            '{"event": "environment", "cuda": null, "threads": 1, "kernels_reason": "no AMX"}',
        ),
        (Tuning(0, "main", []), '{"event": "tuning", "stage": 0, "name": "main", "rows": []}'),
        (
            PeakMemory(0, "main", 7, 9),
            '{"event": "memory", "stage": 0, "name": "main", "gpu_memory_mb": 7, '
            '"gpu_reserved_mb": 9}',
        ),
        (
            StageStart(steps=8, from_step=0, streaming=True, stage=0, name="main"),
            '{"event": "stage", "steps": 8, "from_step": 0, "streaming": true, "stage": 0, '
            '"name": "main"}',
        ),
        (
            StageStart(
                steps=8,
                from_step=2,
                questions=9,
                images=4,
                left_out={"bad": 1},
                stage=0,
                name="main",
            ),
            '{"event": "stage", "steps": 8, "from_step": 2, "questions": 9, "images": 4, '
            '"left_out": {"bad": 1}, "stage": 0, "name": "main"}',
        ),
        (TRAIN, f'{{"event": "train", "step": 3, "of": 8, {FIGURES}}}'),
        (
            Evaluation(step=3, accuracy=0.5, n=4, loss=None, tokens=0, by_category={}),
            '{"event": "evaluate", "step": 3, "accuracy": 0.5, "n": 4, "loss": null, '
            '"tokens": 0, "by_category": {}}',
        ),
    ],
)
def test_an_event_is_a_line_of_json(event: Event, line: str) -> None:
    assert json.dumps(event.line()) == line
