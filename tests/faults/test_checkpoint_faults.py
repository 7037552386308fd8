"""FAULTS 37, 38, 40 to 42, 47 to 49.

What is on disk survives kills, full disks and flipped bytes; a resumed run equals an uninterrupted
one.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.forked_runs import ended, hidden, runs, stage_of, start, stopped_at, until
from tests.helpers.tiny_models import assert_same_bits, built, interrupted, stage_loop, tensors_of
from vlm_tune.api import sft
from vlm_tune.data.batching.loader import Position
from vlm_tune.errors import RecipeError, TrainingError
from vlm_tune.events import Evaluation, Event, Note, TrainSteps
from vlm_tune.model.committed_folders import is_whole, recover_folders
from vlm_tune.train.checkpoint import (
    CheckpointWriter,
    Progress,
    capture_checkpoint,
    checkpoints,
    last_checkpoint,
    random_state,
    step_folder,
)
from vlm_tune.train.evaluator import Evaluator
from vlm_tune.train.step_trace import read_trace
from vlm_tune.train.trainer import StageLoop


def flip(path: Path) -> None:
    """Changes one bit of a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def sizes(folder: Path) -> dict[str, int]:
    """Every file's size by its place.

    Folders in the making have a name of their own in every attempt.
    """
    file_sizes = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file()
    }
    return {re.sub(r"/\.(\w+)-[^/]*", r"/.\1", name): size for name, size in file_sizes.items()}


@pytest.mark.slow
def test_fault_37_kill_minus_9_at_every_file_operation_of_a_save(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """A save that replaces a damaged folder and rotates one away.

    The one before it and the best are whole after any kill.
    """
    recipe = runs(tiny_recipe, train__steps=1)
    loop = stage_loop(built(recipe), recipe, tmp_path / "once")
    objective: Any = loop.objective(loop.engine.model, next(loop.data.feed.windows(Position()))[0])
    loop.engine.backward(objective.sum)
    loop.engine.step()
    stage = stage_of(tmp_path / "run")

    def save(step: int, keep: int) -> None:
        progress = Progress(step=step, best_step=0)
        state = random_state(torch.device("cpu"))
        write = capture_checkpoint(
            loop.model, loop.engine.optimizer_state(), {}, progress, "", [state], {}
        )
        CheckpointWriter(stage, keep, background=False).save(step, write, 0)

    # In a process of its own: a fork of one that has written before may wait for a thread that it
    # does not have.
    assert ended(start(lambda: [save(step, 9) for step in (0, 1, 2, 3)], tmp_path / "said")) == [0]
    flip(step_folder(stage, 3) / "connector.safetensors")
    run, before, states = tmp_path / "run", tmp_path / "before", tmp_path / "states"
    shutil.copytree(run, before)

    left_by: list[Path] = []
    entries: set[tuple[str, os.stat_result]] = set()

    def keep(number: int) -> bool:
        # On disk is what a kill at this moment leaves there. Most operations change nothing of it,
        # and then it is what the one before them left.
        nonlocal entries
        now = {(str(path), path.stat()) for path in run.rglob("*")}
        if left_by and now == entries:
            left_by.append(left_by[-1])
        else:
            left_by.append(shutil.copytree(run, states / str(number)))
        entries = now
        return False

    stopped_at(lambda: save(3, 2), keep)
    count = len(left_by)
    for number in range(0, count, 100):  # and what a real one leaves is the same
        shutil.rmtree(run)
        shutil.copytree(before, run)
        stopped_at(lambda: save(3, 2), lambda seen, number=number: seen == number)
        assert sizes(run) == sizes(left_by[number]), number
    ends = set()
    for number, left in enumerate(dict.fromkeys(left_by)):
        recover_folders(stage_of(left) / "checkpoints")
        last = last_checkpoint(left, ["main"])
        assert last is not None and is_whole(step_folder(stage_of(left), 0)), number
        ends.add(last[0].name)
        assert hidden(left) == []
        if (
            number % 20 == 0 and last[0].name == "step-0000002"
        ):  # what is whole by its manifest has the bits that were saved
            assert_same_bits(last[0], step_folder(stage_of(before), 2))
    shutil.rmtree(run)
    shutil.copytree(before, run)
    stopped_at(lambda: save(3, 2), lambda seen: False)
    assert count > 100
    assert ends == {"step-0000002", "step-0000003"}
    assert [path.name for path in checkpoints(stage)] == [
        f"step-000000{step}" for step in (0, 2, 3)
    ]


@pytest.mark.slow
def test_fault_38_a_full_disk_keeps_the_older_checkpoint(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    recipe = runs(tiny_recipe, train__steps=20)

    def fill(event: Event) -> None:
        if isinstance(event, TrainSteps) and event.step == 2:
            until(
                lambda: is_whole(step_folder(stage_of(tmp_path / "run"), 1))
            )  # it is written beside training
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    assert ended(start(lambda: sft(recipe, show=fill), tmp_path / "said")) == [5]
    output = (tmp_path / "said.0").read_text()
    assert (
        "step-0000002 could not be written" in output
        and "File too large" in output
        and "kept: step-0000001; --resume" in output
    )
    assert hidden(tmp_path / "run") == []
    assert [path.name for path in checkpoints(stage_of(tmp_path / "run"))] == ["step-0000001"]
    assert is_whole(step_folder(stage_of(tmp_path / "run"), 1))
    assert sft(recipe, resume=True).folder == tmp_path / "run"


EXACT = {
    "accumulation, mid-epoch": (
        {"train__batch_size": 2, "train__gradient_accumulation": 2, "train__steps": 5},
        [3],
    ),
    "the epoch's end, two loader workers": (
        {"train__batch_size": 4, "train__loader_workers": 2, "train__steps": 6},
        [4],
    ),
    "mid-epoch, two loader workers": (
        {"train__batch_size": 2, "train__loader_workers": 2, "train__steps": 5},
        [1],
    ),
    "a stream": (
        {
            "train__batch_size": 3,
            "data__streaming": True,
            "data__shuffle_buffer": 3,
            "train__steps": 6,
        },
        [2],
    ),
}


def resumed_is_whole(
    tiny_recipe: Callable[..., str], tmp_path: Path, changes: dict[str, Any], stops: list[int]
) -> None:
    """A run that is stopped after some steps, and resumed each time, equals an undisturbed one."""
    sft(runs(tiny_recipe, "whole", **changes))
    recipe = runs(tiny_recipe, "parts", **changes)
    for place, step in enumerate(stops):
        interrupted(partial(sft, recipe, resume=place > 0), stage=0, step=step)
    sft(recipe, resume=True)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trace = read_trace(stage_of(whole))
    assert [step.step for step in trace] == list(range(1, changes["train__steps"] + 1))
    assert len({step.samples for step in trace}) > 1
    assert trace == read_trace(stage_of(parts))
    assert_same_bits(whole / "model", parts / "model")
    assert_same_bits(
        *(step_folder(stage_of(run), changes["train__steps"]) for run in (whole, parts))
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", EXACT)
def test_fault_40_a_resumed_run_is_the_same_run(
    case: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    resumed_is_whole(tiny_recipe, tmp_path, *EXACT[case])


@pytest.mark.slow
def test_fault_41_a_run_resumed_twice_is_the_same_run(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    changes = {"train__batch_size": 3, "train__gradient_accumulation": 2, "train__steps": 6}
    resumed_is_whole(tiny_recipe, tmp_path, changes, [2, 5])


@pytest.mark.slow
def test_fault_42_a_changed_recipe_is_refused_with_a_diff_unless_told(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    interrupted(partial(sft, runs(tiny_recipe)), stage=0, step=2)
    changed = runs(tiny_recipe, train__learning_rate=0.01)
    with pytest.raises(
        RecipeError, match=r"train\.learning_rate: 0\.003 -> 0\.01(.|\n)*--accept-changes"
    ):
        sft(changed, resume=True)
    events: list[Event] = []
    sft(changed, resume=True, accept_changes=True, show=events.append)
    assert "resumed with a changed recipe: train.learning_rate: 0.003 -> 0.01" in [
        event.text for event in events if isinstance(event, Note)
    ]
    assert [event.step for event in events if isinstance(event, TrainSteps)] == [3, 4]
    sft(changed, resume=True)  # from now on it is the run's own


@pytest.mark.slow
def test_fault_47_out_of_memory_says_what_to_change(
    tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = StageLoop._step

    def step(self: StageLoop, batches: Any, step: int, *rest: Any) -> float:
        if step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return real(self, batches, step, *rest)

    monkeypatch.setattr(StageLoop, "_step", step)
    with pytest.raises(
        TrainingError,
        match=r"a process needs \d+\.\d\d GB, and \d+\.\d\d GB with .*--set train\.\w+=",
    ) as raised:
        sft(runs(tiny_recipe))
    assert raised.value.exit_code == 5 and raised.value.by_recipe
    assert hidden(tmp_path / "run") == []
    assert all(is_whole(path) for path in checkpoints(stage_of(tmp_path / "run")))
    assert checkpoints(stage_of(tmp_path / "run"))[-1].name == "step-0000002"


@pytest.mark.slow
def test_fault_48_a_corrupt_newest_checkpoint_falls_back_and_says_so(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    sft(runs(tiny_recipe, "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    recipe = runs(tiny_recipe)
    for step, name in ((4, "connector.safetensors"), (3, "trainer/optimizer.safetensors")):
        flip(step_folder(stage_of(tmp_path / "run"), step) / name)
    events: list[Event] = []
    sft(recipe, resume=True, accept_changes=True, show=events.append)
    notes = [event.text for event in events if isinstance(event, Note)]
    for step in (4, 3):
        assert f"step-000000{step} of 1-main is damaged; continuing from step-0000002" in notes
    assert [event.step for event in events if isinstance(event, TrainSteps)] == [3, 4]
    assert_same_bits(tmp_path / "whole" / "model", tmp_path / "run" / "model")
    assert read_trace(stage_of(tmp_path / "whole")) == read_trace(stage_of(tmp_path / "run"))


@pytest.mark.slow
def test_fault_48_a_corrupt_best_checkpoint_does_not_stop_the_stage_at_its_end(
    tiny_recipe: Callable[..., str],
    color_rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores = iter([0.5, 0.9, 0.1])
    monkeypatch.setattr(
        Evaluator,
        "_scored",
        lambda self, step: Evaluation(step=step, accuracy=next(scores), loss=1.0, n=8),
    )
    validation = [{"kind": "file", "path": str(color_rows)}]
    recipe = runs(tiny_recipe, data__validation=validation, evaluate__every=1, train__steps=3)
    events: list[Event] = []

    def show(event: Event) -> None:
        events.append(event)
        if isinstance(event, Evaluation) and event.step == 3:
            until(
                lambda: is_whole(step_folder(stage_of(tmp_path / "run"), 2))
            )  # it is written beside training
            flip(step_folder(stage_of(tmp_path / "run"), 2) / "connector.safetensors")

    run = sft(recipe, show=show).folder
    notes = [event.text for event in events if isinstance(event, Note)]
    assert "step-0000002 of 1-main, which scored better, is damaged and was skipped" in notes
    assert "continuing with the best checkpoint, step 1 (exact_match 0.5000)" in notes
    first = tensors_of(step_folder(stage_of(run), 1))
    assert all(torch.equal(value, first[name]) for name, value in tensors_of(run / "model").items())
    assert json.loads((stage_of(run) / "done.json").read_text())["best_step"] == 1


def test_fault_49_rotation_never_removes_the_last_good_or_the_best(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "a").write_text("a")

    writer = CheckpointWriter(tmp_path, 1, background=True)
    for step, best, left in ((1, 1, [1]), (2, 1, [1, 2]), (3, 1, [1, 3]), (4, 4, [4])):
        writer.save(step, write, best)
        writer.wait()
        assert [path.name for path in checkpoints(tmp_path)] == [
            f"step-000000{step}" for step in left
        ]
        assert all(is_whole(path) for path in checkpoints(tmp_path))

    def fails(folder: Path) -> None:
        (folder / "a").write_text("a")
        raise OSError(28, os.strerror(28))

    writer.save(5, fails, 4)
    with pytest.raises(
        TrainingError,
        match=r"step-0000005 could not be written .*No space left.*kept: step-0000004",
    ):
        writer.wait()
    writer.close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000004"]
