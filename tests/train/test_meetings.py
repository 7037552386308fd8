"""The processes meet before each step: what they agree on, and a run that stops there."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.forked_runs import runs, stage_of
from tests.helpers.tiny_models import assert_same_bits
from vlm_tune.api import sft
from vlm_tune.errors import Interrupted, TrainingError
from vlm_tune.events import Event, StageStart
from vlm_tune.train.checkpoint import checkpoints
from vlm_tune.train.meetings import Meetings
from vlm_tune.train.step_trace import DIGESTS


def test_a_process_alone_meets_itself() -> None:
    stops, failed = [False], [False]
    waited: list[int] = []
    writer: Any = SimpleNamespace(failed=lambda: failed[0], wait=lambda: waited.append(1))
    accelerator: Any = SimpleNamespace(num_processes=1)
    meetings = Meetings(accelerator, 9.0, stop=lambda: stops[0], writer=writer)
    meeting = meetings.before_step(0, DIGESTS - 1, 70)
    # A step without supervised items divides by one.
    assert (meeting.items, meeting.samples, meeting.stops) == (1, DIGESTS - 1, False)
    assert meeting.costs.tolist() == [70]
    stops[0] = True
    assert meetings.before_step(3, 5, 1).stops and meetings.stopping()
    failed[0] = True
    for meet in (lambda: meetings.before_step(3, 5, 1), meetings.stopping):
        with pytest.raises(TrainingError, match="could not write its checkpoint"):
            meet()
    assert len(waited) == 2


@pytest.mark.slow
def test_a_run_asked_before_its_first_step_takes_none_and_goes_on(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """And the bits are those of a run that was not asked."""

    def stop(event: Event) -> None:
        if isinstance(event, StageStart):
            os.kill(os.getpid(), signal.SIGTERM)

    whole = sft(runs(tiny_recipe, "whole", train__steps=2)).folder
    recipe = runs(tiny_recipe, "asked", train__steps=2)
    with pytest.raises(Interrupted, match="stopped before the first step; go on with --resume"):
        sft(recipe, show=stop)
    assert not checkpoints(stage_of(tmp_path / "asked"))
    assert_same_bits(sft(recipe, resume=True).folder / "model", whole / "model")
