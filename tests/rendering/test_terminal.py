"""Progress display.

Lines where the output is no terminal, with a clock of the test's own.
"""

from __future__ import annotations

import io
import logging
import threading
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from vlm_tune.events import (
    Environment,
    Evaluation,
    Event,
    Features,
    FinalScores,
    Note,
    PeakMemory,
    Preparing,
    Scoring,
    StageEvent,
    StageStart,
    TrainSteps,
    TrialEnd,
    TrialStart,
)
from vlm_tune.rendering.terminal import EVERY, Display

TRAIN = TrainSteps(
    step=10,
    of=400,
    loss=1.0,
    questions_per_s=1.0,
    tokens_per_s=1.0,
    padding=0.0,
    stall=0.0,
    imbalance=1.0,
    learning_rate=1e-3,
    left=60.0,
)


class Shown:
    """A display that writes to a text, and seconds that pass when they are added."""

    def __init__(self, *, terminal: bool = False) -> None:
        self.now = 1000.0
        self.file = io.StringIO()
        console = Console(file=self.file, force_terminal=terminal, width=60)
        self.display = Display(console, clock=lambda: self.now, beats=False)

    def after(self, seconds: float) -> list[str]:
        """The lines that are new after so many seconds."""
        self.now += seconds
        before = len(self.file.getvalue())
        self.display.beat()
        return self.file.getvalue()[before:].splitlines()

    def event(self, event: Event) -> list[str]:
        before = len(self.file.getvalue())
        self.display(event)
        return self.file.getvalue()[before:].splitlines()


def test_a_phase_is_a_line_when_it_begins_and_every_half_minute_after() -> None:
    shown = Shown()
    assert shown.event(Scoring(0, 780)) == ["answering 0 of 780 questions"]
    assert shown.event(Scoring(64, 780)) == []
    assert shown.after(EVERY - 1) == []
    assert shown.after(1) == ["answering 64 of 780 questions (0:30 so far)"]
    assert shown.after(EVERY - 1) == []
    shown.event(Scoring(128, 780))
    assert shown.after(61) == ["answering 128 of 780 questions (2:00 so far)"]


def test_the_thread_ends_when_the_display_is_closed_while_it_looks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A logging handler has attributes of its own, one of which `close` sets."""
    faults: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", faults.append)
    monkeypatch.setattr("vlm_tune.rendering.terminal.LOOK", 0.001)
    looks = threading.Event()

    class Closed(Display):
        def beat(self) -> None:
            self.close()
            looks.set()

    before = set(threading.enumerate())
    Closed(Console(file=io.StringIO(), force_terminal=False))
    assert looks.wait(60)
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
    assert not faults


def test_trials_of_a_sweep_are_lines_also_on_a_terminal() -> None:
    for terminal in (False, True):
        shown = Shown(terminal=terminal)
        start = " ".join(shown.event(TrialStart(1, 3, {"seed": 2})))
        assert "trial 1 of 3: seed 2" in start
        end = TrialEnd(number=1, of=3, state="pruned", seconds=4.0, reason="worse")
        assert "trial 1 of 3 pruned (worse), 4.0 s" in " ".join(shown.event(end))


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (Preparing("train", 2000, name="main"), "preparing main train: 2,000 rows"),
        (Features(64, 4000), "computing tower features: 64 of 4,000 inputs"),
    ],
)
def test_every_phase_says_how_far_it_is(event: Event, line: str) -> None:
    shown = Shown()
    assert shown.event(event) == [line]
    assert shown.after(EVERY) == [f"{line} (0:30 so far)"]


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ({"images": 1}, "1 image"),
        ({"images": 0}, "0 images"),
        ({"images": 0, "clips": 1}, "1 audio clip"),
        ({"images": 2000, "frames": 8}, "2,000 images, 8 video frames"),
    ],
)
def test_a_stage_begins_with_what_it_trains_on(counts: dict[str, int], text: str) -> None:
    start = StageStart(steps=2, from_step=0, questions=4, stage=0, name="main", **counts)
    assert Shown().event(start) == [f"stage 1 main: 4 question-answer pairs, {text}, 2 steps"]


def test_a_gpu_and_its_peak_memory_are_shown() -> None:
    shown = Shown()
    gpu = {"device": "H100", "memory_gb": 85.0, "capability": "9.0", "driver": None}
    versions = {"cuda": "13.0", "cudnn": 91300, "nccl": "2.27.7"}
    assert shown.event(Environment(gpu | versions, "")) == [
        "H100: 85.0 GB, compute capability 9.0, CUDA 13.0, cuDNN 91300, NCCL 2.27.7"
    ]
    assert (
        "padding 0.0%  peak 12.3 GB  1:00 left"
        in shown.event(replace(TRAIN, gpu_memory_mb=12345))[0]
    )
    assert "padding 0.0%  1:00 left" in shown.event(TRAIN)[0]
    assert shown.event(PeakMemory(0, "main", 12345, 13000)) == [
        "peak GPU memory of stage 1 main: 12.3 GB, 13.0 GB reserved"
    ]


def test_steps_that_take_long_are_no_silence() -> None:
    shown = Shown()
    assert len(shown.event(TRAIN)) == 1
    assert shown.after(EVERY) == ["training, past step 10 of 400 (0:30 so far)"]
    shown.event(Scoring(64, 64))
    shown.event(Evaluation(step=10, accuracy=0.5, n=64, loss=1.0))
    assert shown.after(EVERY) == ["training, past step 10 (0:30 so far)"]


def test_what_the_package_logs_is_shown_until_the_display_is_closed() -> None:
    shown = Shown()
    log = logging.getLogger("vlm_tune.somewhere")
    with shown.display:
        log.info("compiling %s, some %d seconds", "kernels", 20)
        log.warning("a warning")
        assert shown.file.getvalue().splitlines() == [
            "compiling kernels, some 20 seconds",
            "a warning",
        ]
        assert shown.after(EVERY) == ["compiling kernels, some 20 seconds (0:30 so far)"]
    log.info("not shown")
    assert shown.after(10 * EVERY) == []
    assert "not shown" not in shown.file.getvalue()


def test_nothing_is_said_where_nothing_goes_on() -> None:
    shown = Shown()
    assert shown.after(100 * EVERY) == []
    shown.event(Scoring(1, 2))
    shown.event(FinalScores(accuracy=1.0, n=2, loss=None, tokens=0, by_category={}, by_source={}))
    assert shown.after(100 * EVERY) == []


def test_every_type_of_event_has_its_way_to_be_shown() -> None:
    shown_types = vars(Display)["_show"].dispatcher.registry
    events = {*Event.__subclasses__(), *StageEvent.__subclasses__()} - {StageEvent}
    assert events == shown_types.keys() - {object}


def test_lines_are_not_cut_where_there_is_no_terminal() -> None:
    shown = Shown()
    assert shown.event(Note("word " * 100)) == ["word " * 100]


def test_texts_are_no_markup_of_a_terminal() -> None:
    shown = Shown(terminal=True)
    shown.event(Preparing("train", 1, name="[/nope] a"))
    shown.display.close()
    assert "[/nope]" in shown.file.getvalue()


def test_a_validation_is_shown_by_the_metric_that_chooses_and_by_exact_match() -> None:
    entry = {"value": 0.8125, "low": None, "high": None, "n": 8, "images": 1}
    groups = {
        name: {"accuracy": 0.25, "n": 8, "metrics": metrics}
        for name, metrics in (("a", {"anls": entry}), ("b", {}))
    }
    evaluation = Evaluation(
        step=10,
        accuracy=0.25,
        n=16,
        loss=1.5,
        best_by="anls",
        metrics={"anls": entry},
        by_source=groups,
        skipped={"vqa_accuracy": "no row has several reference `answers`"},
    )
    assert Shown().event(evaluation) == [
        "  step 10: validation ANLS (0.5) 81.25% of 16 (a 81.25% of 8, b - of 8), "
        "exact match 25.00%, loss 1.5000",
        "  vqa_accuracy is not computed: no row has several reference `answers`",
    ]
    by_loss = replace(evaluation, best_by="loss", metrics=None, skipped=None, by_source=None)
    assert Shown().event(by_loss) == [
        "  step 10: validation exact match 25.00% of 16, loss 1.5000",
    ]
    # Span corruption answers nothing.
    assert Shown().event(replace(by_loss, accuracy=None)) == [
        "  step 10: validation loss 1.5000 of 16",
    ]
