"""The processes meet before each step: what they agree on, and a run that stops there."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.forked_runs import ended, runs, stage_of, start
from tests.helpers.tiny_models import assert_same_bits
from vlm_tune.api import sft
from vlm_tune.errors import Interrupted, TrainingError
from vlm_tune.events import Event, Scoring, StageStart
from vlm_tune.train.checkpoint import checkpoints
from vlm_tune.train.meetings import Meetings
from vlm_tune.train.objectives import Counts
from vlm_tune.train.step_trace import DIGESTS
from vlm_tune.train.trainer import StageLoop


def test_a_process_alone_meets_itself() -> None:
    stops, failed = [False], [False]
    waited: list[int] = []
    writer: Any = SimpleNamespace(failed=lambda: failed[0], wait=lambda: waited.append(1))
    accelerator: Any = SimpleNamespace(num_processes=1)
    meetings = Meetings(accelerator, 9.0, stop=lambda: stops[0], writer=writer)
    meeting = meetings.before_step(Counts(0), DIGESTS - 1, 70)
    # A step without supervised items divides by one.
    assert (meeting.counts.items, meeting.samples, meeting.stops) == (1, DIGESTS - 1, False)
    assert meeting.costs.tolist() == [70]
    stops[0] = True
    assert meetings.before_step(Counts(3), 5, 1).stops and meetings.stopping()
    failed[0] = True
    for meet in (lambda: meetings.before_step(Counts(3), 5, 1), meetings.stopping):
        with pytest.raises(TrainingError, match="could not write its checkpoint"):
            meet()
    assert len(waited) == 2
    writer.settle = lambda: waited.append(2)
    with pytest.raises(TrainingError, match="could not write its checkpoint"):
        meetings.written()
    assert waited[2:] == [2, 1]  # what is still being written may fail too


@pytest.mark.slow
def test_every_rank_knows_of_a_checkpoint_that_failed(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """The first one's write fails once the ranks have met before the second step."""

    def failing() -> None:
        begun = threading.Event()
        loops: Any = StageLoop
        step, captured = loops._step, loops._captured

        def stepped(loop: StageLoop, batches: Any, number: int, *rest: Any) -> float:
            if number == 2:
                begun.set()
            return step(loop, batches, number, *rest)

        def fails(folder: Path) -> None:
            begun.wait()
            raise OSError(errno.ENOSPC, "No space left on device")

        loops._step = stepped
        loops._captured = lambda loop, states: captured(loop, states) and fails
        # Two steps to an epoch, at whose end a write is waited for.
        sft(runs(tiny_recipe, train__steps=3, train__batch_size=2))

    assert ended(start(failing, tmp_path / "output", ranks=2)) == [5, 5]
    outputs = [(tmp_path / f"output.{rank}").read_text() for rank in range(2)]
    assert "step-0000001 could not be written ([Errno 28] No space left" in outputs[0]
    assert "TrainingError: rank 0 could not write its checkpoint" in outputs[1]


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
    with pytest.raises(Interrupted, match="stopped before the first step; continue with --resume"):
        sft(recipe, show=stop)
    assert not checkpoints(stage_of(tmp_path / "asked"))
    assert_same_bits(sft(recipe, resume=True).folder / "model", whole / "model")


@pytest.mark.slow
def test_a_stop_in_the_last_evaluation_counts_each_time(
    tiny_recipe: Callable[..., str], color_rows: Path, tmp_path: Path
) -> None:
    """A stage ends with its scores, however often it is asked to stop before them."""

    def stop(event: Event) -> None:
        if isinstance(event, Scoring):
            os.kill(os.getpid(), signal.SIGTERM)

    validation = [{"kind": "file", "path": str(color_rows)}]
    recipe = runs(tiny_recipe, train__steps=1, data__validation=validation)
    for resume in (False, True):
        with pytest.raises(Interrupted, match="stopped at step 1 of 1; continue with --resume"):
            sft(recipe, resume=resume, show=stop)
    folder = sft(recipe, resume=True).folder
    done = json.loads((stage_of(folder) / "done.json").read_text())
    assert [scores["step"] for scores in done["history"]] == [1] and not done["unscored"]
