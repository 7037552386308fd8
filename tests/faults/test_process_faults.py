"""FAULTS 39, 43 to 46, 50, 51, 53.

Signals, another number of ranks, steps that are not finite, killed workers and ranks, two runs in a
folder, trackers, ranks without images.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.forked_runs import ended, hidden, runs, stage_of, start, until
from tests.helpers.tiny_models import LORA_TUNE, assert_close, assert_same_bits, parsed, with_tune
from vlm_tune.api import sft
from vlm_tune.errors import DataError, TrainingError
from vlm_tune.events import Event, Note, TrainSteps
from vlm_tune.model.committed_folders import is_whole
from vlm_tune.model.feature_cache import FeatureStore
from vlm_tune.train import evaluator, trackers, trainer, watchdog
from vlm_tune.train.checkpoint import CheckpointWriter, checkpoints, step_folder
from vlm_tune.train.step_trace import read_trace


def two_ranks(
    tiny_recipe: Callable[..., str], color_rows: Path, output: str, **changes: Any
) -> Any:
    validation = [{"kind": "file", "path": str(color_rows)}]
    return runs(
        tiny_recipe,
        output,
        **(
            {"data__validation": validation, "train__batch_size": 2, "evaluate__every": 2} | changes
        ),
    )


def once(act: Callable[..., Any]) -> Callable[..., Any]:
    """Calls `act` before the first call only."""
    calls: list[int] = []

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            if not calls:
                calls.append(1)
                act()
            return real(*arguments, **named)

        return wrapped

    return wrap


@pytest.mark.slow
def test_fault_39_a_signal_to_one_rank_stops_both_at_one_step_and_the_resumed_run_is_the_same(
    tiny_recipe: Callable[..., str], color_rows: Path, tmp_path: Path
) -> None:
    whole = two_ranks(tiny_recipe, color_rows, "whole")
    assert ended(start(lambda: sft(whole), tmp_path / "whole-said", ranks=2)) == [0, 0]
    for where, owner, name, rank, number in (
        ("step", trainer.StageLoop, "_step", 1, signal.SIGTERM),
        ("evaluation", evaluator, "score", 1, signal.SIGINT),
        ("save", CheckpointWriter, "_write", 0, signal.SIGTERM),
    ):
        recipe, log = two_ranks(tiny_recipe, color_rows, where), tmp_path / f"{where}-said"

        def act(
            recipe: Any = recipe,
            owner: Any = owner,
            name: str = name,
            rank: int = rank,
            number: Any = number,
        ) -> None:
            def kill() -> None:
                if os.environ["RANK"] == str(rank):
                    os.kill(os.getpid(), number)

            setattr(owner, name, once(kill)(getattr(owner, name)))
            sft(recipe)

        assert ended(start(act, log, ranks=2)) == [130, 130], Path(f"{log}.0").read_text()
        assert "continue with --resume" in Path(f"{log}.1").read_text()
        stopped = read_trace(stage_of(tmp_path / where))[-1].step
        assert stopped < 4 and is_whole(step_folder(stage_of(tmp_path / where), stopped))
        assert ended(start(lambda recipe=recipe: sft(recipe, resume=True), log, ranks=2)) == [0, 0]
        assert read_trace(stage_of(tmp_path / where)) == read_trace(stage_of(tmp_path / "whole"))
        # Dropout draws from each rank's own random numbers.
        assert_same_bits(tmp_path / where / "model", tmp_path / "whole" / "model")
        scores = [
            json.loads((stage_of(tmp_path / run) / "done.json").read_text())["history"]
            for run in (where, "whole")
        ]
        assert scores[0] == scores[1]


@pytest.mark.slow
def test_fault_39_a_second_signal_leaves_at_once_without_harm(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    def twice(event: Event) -> None:
        if isinstance(event, TrainSteps) and event.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

    recipe = runs(tiny_recipe)
    assert ended(start(lambda: sft(recipe, show=twice), tmp_path / "said")) == [130]
    saved = checkpoints(stage_of(tmp_path / "run"))
    # That of step 2 may still have been in the making.
    assert saved[0].name == "step-0000001" and all(is_whole(path) for path in saved)
    sft(recipe, resume=True)
    assert hidden(tmp_path / "run") == []


@pytest.mark.slow
def test_fault_43_another_number_of_ranks_sees_the_same_order(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """One rank to step 2, then two."""

    def recipe(output: str) -> Any:
        text = with_tune(tiny_recipe("causal", output=output), LORA_TUNE)
        changes: dict[str, Any] = {
            "train__steps": 5,
            "train__batch_size": 3,
            "train__log_every": 1,
            "evaluate__samples": 0,
        }
        return parsed(text, **changes, data__validation=[])

    def stop(event: Event) -> None:
        if isinstance(event, TrainSteps) and event.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    one, other, log = recipe("one"), recipe("other"), tmp_path / "said"
    assert ended(start(lambda: sft(one), log)) == [0]
    assert ended(start(lambda: sft(other, show=stop), log)) == [130]
    assert ended(start(lambda: sft(other, resume=True), log, ranks=2)) == [0, 0], (
        tmp_path / "said.1"
    ).read_text()
    whole, parts = (read_trace(stage_of(tmp_path / name)) for name in ("one", "other"))
    assert [step.step for step in parts] == [1, 2, 3, 4, 5]
    assert len({step.samples for step in whole}) > 1
    assert [step.samples for step in parts] == [step.samples for step in whole]
    assert [step.loss for step in parts] == pytest.approx([step.loss for step in whole], rel=1e-4)


def poison(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Makes the features of one image NaN."""
    real = FeatureStore.__call__
    monkeypatch.setattr(
        FeatureStore,
        "__call__",
        lambda self, media: (
            real(self, media) * (float("nan") if media.name.endswith(name) else 1.0)
        ),
    )


@pytest.mark.slow
def test_fault_44_a_poisoned_sample_stops_after_k_steps_with_its_ids_dumped(
    tiny_recipe: Callable[..., str],
    color_rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    poison(monkeypatch, "green.png")
    validation = {
        "data__validation": [{"kind": "file", "path": str(color_rows)}],
        "evaluate__every": 1,
    }
    recipe = runs(tiny_recipe, train__batch_size=8, train__max_nonfinite=2, **validation)
    with pytest.raises(
        TrainingError,
        match=r"the loss is nan at step 2; the batch holds .*nonfinite\.jsonl.*2th such step "
        r"in a row",
    ):
        sft(recipe)
    dumped = [
        json.loads(line)
        for line in (stage_of(tmp_path / "run") / "nonfinite.jsonl").read_text().splitlines()
    ]
    assert [(line["step"], line["loss"], len(line["samples"])) for line in dumped] == [
        (1, "nan", 8),
        (2, "nan", 8),
    ]
    assert checkpoints(stage_of(tmp_path / "run")) == []
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.slow
def test_fault_44_single_steps_are_left_out_and_never_marked_best(
    tiny_recipe: Callable[..., str],
    color_rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    poison(monkeypatch, "green.png")
    validation = {
        "data__validation": [{"kind": "file", "path": str(color_rows)}],
        "evaluate__every": 1,
    }
    events: list[Event] = []
    # Of eight batches of one row two hold the poisoned image; the last step is a good one.
    recipe = runs(
        tiny_recipe,
        train__batch_size=1,
        train__steps=7,
        train__max_nonfinite=3,
        seed=3,
        **validation,
    )
    sft(recipe, show=events.append)
    trace = read_trace(stage_of(tmp_path / "run"))
    left_out = [step.step for step in trace if step.loss == "nan"]
    assert (
        left_out
        and [
            event.step for event in events if isinstance(event, Note) and "is skipped" in event.text
        ]
        == left_out
    )
    done = json.loads((stage_of(tmp_path / "run") / "done.json").read_text())
    assert len(done["history"]) == 7 and done["best_step"] is None
    assert {path.name for path in checkpoints(stage_of(tmp_path / "run"))} == {
        f"step-{step:07d}" for step in range(1, 8) if step not in left_out
    }


@pytest.mark.slow
def test_fault_45_a_killed_loader_worker_names_the_sample(
    tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, real = os.getpid(), FeatureStore.__call__

    def fetch(self: FeatureStore, media: Any) -> torch.Tensor:
        if media.name.endswith("green.png") and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, media)

    monkeypatch.setattr(FeatureStore, "__call__", fetch)
    with pytest.raises(
        DataError, match=r"a loader process was killed .*at step 1 of epoch 1"
    ) as raised:
        sft(runs(tiny_recipe, train__batch_size=8, train__loader_workers=2))
    assert "messages:2" in str(raised.value) or "messages:3" in str(raised.value)
    assert raised.value.exit_code == 3


@pytest.mark.slow
def test_fault_45_a_worker_killed_while_the_others_start_names_the_sample_too(
    tiny_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_workers(loader: Any) -> Any:
        raise RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed. ")

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", start_workers)
    with pytest.raises(
        DataError,
        match=r"a loader process was killed .*pid 4711.*at step 1 of epoch 1 or soon after: "
        r"\S*messages:\d",
    ):
        sft(runs(tiny_recipe, train__batch_size=8, train__loader_workers=2))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_fault_46_a_lost_rank_is_named_and_the_others_leave(
    number: signal.Signals, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    recipe = runs(
        tiny_recipe,
        train__batch_size=2,
        train__steps=100_000,
        train__timeout=20.0,
        train__checkpoints={"every": 2, "keep": 2},
    )
    pids = start(lambda: sft(recipe), tmp_path / "said", ranks=2)
    try:
        until(lambda: len(read_trace(stage_of(tmp_path / "run"))) > 5)
        os.kill(pids[1], number)
        assert ended(pids[:1]) == [5], (tmp_path / "said.0").read_text()
    finally:
        os.kill(pids[1], signal.SIGKILL)
    assert ended(pids[1:]) == [-9]
    output = (tmp_path / "said.0").read_text()
    assert (
        f"rank 1 (process {pids[1]} on " in output and "is lost" in output and "--resume" in output
    )
    saved = checkpoints(stage_of(tmp_path / "run"))
    assert saved and any(is_whole(path) for path in saved)


@pytest.mark.slow
def test_fault_46_a_stuck_collective_names_who_is_waited_for(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    recipe = runs(tiny_recipe, train__batch_size=2, train__steps=100_000, train__timeout=20.0)

    def act() -> None:
        real = trainer.StageLoop._step

        def step(self: Any, batches: Any, number: int, *rest: Any) -> float:
            if number == 3 and os.environ["RANK"] == "1":
                signal.pause()  # alive, and never comes
            return real(self, batches, number, *rest)

        trainer.StageLoop._step = step  # type: ignore[method-assign]
        sft(recipe)

    pids = start(act, tmp_path / "said", ranks=2)
    try:
        assert ended(pids[:1]) == [5]
    finally:
        os.kill(pids[1], signal.SIGKILL)
    ended(pids[1:])
    output = (tmp_path / "said.0").read_text()
    assert (
        "the least advanced first: rank 1 at step 3, meeting the others; rank 0 at step 3" in output
    ), output


def test_fault_46_a_step_that_was_slow_once_ends_nobody_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A diagnosis of a wait that has ended counts no more: later steps may take seconds."""
    watch = watchdog.Watch(
        SimpleNamespace(process_index=0, num_processes=1),  # type: ignore[arg-type]
        1800.0,
    )
    ended: list[int] = []
    monkeypatch.setattr(watchdog.os, "_exit", ended.append)
    monkeypatch.setattr(watchdog, "GRACE", -1.0)
    watch._judge(1790.0)
    watch._judge(0.1)
    watch._judge(10.0)
    assert ended == []
    for _ in range(2):
        watch._judge(1790.0)
    assert ended == [5]


class _OthersLive:
    """A common store in which the other process beats at each look."""

    def __init__(self) -> None:
        self.beats = count()

    def check(self, keys: list[str]) -> bool:
        return True

    def get(self, key: str) -> str:
        return json.dumps(
            {"place": "step 1", "count": 0, "reached": [0, 1, 2], "beat": next(self.beats)}
        )


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (
            "ProcessGroupGloo::allgather: invalid tensor type at index 0",
            "the processes could not exchange tensors",
        ),
        (
            "[gloo/transport] Timed out waiting 1800000ms for recv",
            "no progress for 0.2 s (train.timeout)",
        ),
    ],
)
def test_fault_46_an_exchange_that_fails_at_once_is_not_told_as_a_wait(
    raised: str, message: str
) -> None:
    one = watchdog.Watch(
        SimpleNamespace(process_index=0, num_processes=2),  # type: ignore[arg-type]
        0.2,
    )
    one._store = _OthersLive()
    error = one.lost(RuntimeError(raised))
    assert str(error).startswith(message) and raised[:30] in str(error)


@pytest.mark.slow
def test_fault_50_a_second_run_in_a_folder_is_refused_and_a_dead_ones_lock_taken_over(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    recipe = runs(tiny_recipe, train__steps=100_000, train__checkpoints={"every": 2, "keep": 1})
    (first,) = start(lambda: sft(recipe), tmp_path / "first")
    try:
        until(lambda: len(read_trace(stage_of(tmp_path / "run"))) > 3)
        for options in ({"resume": True}, {"overwrite": True}, {}):
            with pytest.raises(
                TrainingError, match=rf"run is in use by process {first} on \S+ since 20\d\d-"
            ):
                sft(recipe, **options)
    finally:
        os.kill(first, signal.SIGKILL)
    assert ended([first]) == [-9]
    events: list[Event] = []

    def stop(event: Event) -> None:
        events.append(event)
        if isinstance(event, TrainSteps):
            os.kill(os.getpid(), signal.SIGTERM)

    from vlm_tune.errors import Interrupted

    with pytest.raises(Interrupted):
        sft(recipe, resume=True, show=stop)
    assert any(
        f"the lock of process {first} on " in event.text
        for event in events
        if isinstance(event, Note)
    )
    assert not list((tmp_path / "run").glob("run.lock*"))


class Broken:
    """A tracker whose library fails at one place."""

    requires_logging_directory = False
    where = ""

    def __init__(self, project: str) -> None:
        self._at("init")

    def _at(self, where: str) -> None:
        if where == self.where:
            raise ConnectionError("no route to the tracker")

    def start(self) -> None:
        self._at("start")

    def store_init_configuration(self, config: Any) -> None:
        self._at("config")

    def log(self, figures: Any, step: int) -> None:
        self._at("log")

    def finish(self) -> None:
        self._at("finish")


@pytest.mark.slow
def test_fault_51_a_tracker_that_fails_does_not_stop_training(
    tiny_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["tensorboard", "wandb", "mlflow"]
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: names)
    for name, where in zip(names, ("init", "log", "finish"), strict=True):
        monkeypatch.setitem(
            trackers.LOGGER_TYPE_TO_CLASS, name, type(name, (Broken,), {"where": where})
        )
    events: list[Event] = []
    run = sft(
        runs(tiny_recipe, train__steps=6, train__trackers=[*names, "trackio"]), show=events.append
    )
    assert (run.folder / "model").is_dir()
    notes = [
        event.text
        for event in events
        if isinstance(event, Note) and event.text.startswith("tracker")
    ]
    assert notes == [
        "tracker tensorboard failed (ConnectionError: no route to the tracker); training continues",
        "tracker trackio is not installed (pip install 'vlm_tune[trackio]'); training "
        "continues without it",
        "tracker wandb failed (ConnectionError: no route to the tracker); training continues",
        "tracker wandb failed 5 times in a row and is no longer used",
        "tracker mlflow failed (ConnectionError: no route to the tracker); training continues",
    ]


LEARNS_IMAGES = """
tune:
  - {match: "tower.*", how: full}
  - {match: "connector.*", how: full}
  - {match: "llm.*", how: lora, r: 4, target_modules: all-linear}
train:"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_fault_53_under_zero_a_rank_without_images_takes_part(
    stage: int,
    tiny_recipe: Callable[..., str],
    color_rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One row of eight has an image, so one of two ranks has none.

    After a step Adam's first moment is a tenth of the gradient.

    The lock of a killed process's build of a DeepSpeed operator is there: whoever waited for it
    would wait for ever.
    """
    import deepspeed  # noqa: F401  (here, and not in every fork)

    (tmp_path / "extensions" / "deepspeed_shm_comm").mkdir(parents=True)
    (tmp_path / "extensions" / "deepspeed_shm_comm" / "lock").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    rows = [json.loads(line) for line in color_rows.read_text().splitlines()]
    for row in rows[1:]:
        row.pop("images")
    color_rows.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def recipe(output: str, size: int, engine: dict[str, Any]) -> Any:
        text = with_tune(tiny_recipe("causal", output=output), LEARNS_IMAGES)
        changes: dict[str, Any] = {
            "train__steps": 1,
            "train__batch_size": size,
            "train__max_grad_norm": None,
            "engine": engine,
        }
        return parsed(text, **changes, data__validation=[], evaluate__samples=0)

    one, two = (
        recipe("one", 8, {"kind": "ddp"}),
        recipe("two", 4, {"kind": "deepspeed", "stage": stage}),
    )
    assert ended(start(lambda: sft(two), tmp_path / "said", ranks=2)) == [0, 0], (
        tmp_path / "said.1"
    ).read_text()
    assert ended(start(lambda: sft(one), tmp_path / "said")) == [0]
    states = [
        load_file(step_folder(stage_of(tmp_path / name), 1) / "trainer" / "optimizer.safetensors")
        for name in ("one", "two")
    ]
    gradients = [
        {name: value * 10 for name, value in state.items() if name.endswith("|exp_avg")}
        for state in states
    ]
    assert any(
        float(value.abs().max()) > 1e-4
        for name, value in gradients[0].items()
        if name.startswith("tower.")
    )
    assert_close(gradients[0], gradients[1])
