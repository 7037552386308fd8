"""Replays steps of a run from one of its checkpoints and compares them with the run's records."""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from vlm_tune.config.load import load_recipe
from vlm_tune.errors import Problem, RecipeError, check_count
from vlm_tune.events import Report
from vlm_tune.model.build import build_processor
from vlm_tune.model.committed_folders import is_whole
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.model.weights import read_safetensors
from vlm_tune.paths import check_path, is_file, shown_path
from vlm_tune.resources import kernel_setting
from vlm_tune.train.accelerator import MIXED, accelerator_of
from vlm_tune.train.allocator import forget_old_kernels, shut_range
from vlm_tune.train.checkpoint import checkpoints, read_progress, stage_folder, step_of
from vlm_tune.train.deterministic import determinism
from vlm_tune.train.engines.registry import engine_of
from vlm_tune.train.environment import environment
from vlm_tune.train.resuming import changed_data, data_differences
from vlm_tune.train.signals import stop_requests
from vlm_tune.train.stage import Context, read_rows, restored_model, stage_loop
from vlm_tune.train.stage_data import stage_fingerprint
from vlm_tune.train.step_trace import Step, read_trace
from vlm_tune.train.trainer import StageLoop
from vlm_tune.train.watchdog import Watch


@dataclass(frozen=True)
class Difference:
    """The first step at which a figure of the replay differs from the run's."""

    what: str
    step: int
    run: Any
    replay: Any


@dataclass
class ReplayReport:
    """The outcome of a replay: its span of steps, what was compared, and the first differences.

    `environment` holds what has changed since the run began: name to [then, now].
    """

    stage: str
    start: int
    end: int
    compared: list[str] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    tensors: dict[int, list[str]] = field(default_factory=dict)
    environment: dict[str, list[Any]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def agrees(self) -> bool:
        """Whether all that was compared is equal, bit for bit."""
        return not self.differences and not any(self.tensors.values())

    def summary(self) -> dict[str, Any]:
        """The report as JSON."""
        return {"agrees": self.agrees, **asdict(self)}


def verify_run(
    run: str | Path, *, steps: int | None = None, show: Report | None = None
) -> ReplayReport:
    """Replays steps of a run and compares losses, gradient norms, sample ids and checkpoints.

    By default it replays from the last whole checkpoint that has another one after it, up to that
    one. Of checkpoints all tensors are compared. Nothing in the run's folder changes.

    Args:
        run: The run's folder.
        steps: Replay this many, from the last checkpoint that has as many after it.
        show: Called with every event.

    Raises:
        RecipeError: If there is no such checkpoint, the number of processes is not the run's, or an
            argument has the wrong type.
        ModelError: If the model can't be restored.
        DataError: If the data can't be read, or has changed.
    """
    check_path("run", run)
    check_count("--steps", steps)
    run = Path(run)
    started = time.perf_counter()
    if not is_file(run / "recipe.yaml"):
        raise RecipeError([Problem(shown_path(run), "no run: there is no recipe.yaml")])
    recipe = load_recipe(run / "recipe.yaml")
    stages = recipe.resolved_stages()
    number, start, end = _span(run, [name for name, _ in stages], steps)
    name, stage = stages[number]
    forget_old_kernels()
    folder = stage_folder(run, number, name)
    progress = read_progress(start)
    section = engine_of(recipe)
    accelerator = accelerator_of(
        recipe if MIXED[recipe.train.precision] == MIXED[stage.train.precision] else stage
    )
    _check_processes(run, progress.processes, accelerator.num_processes)
    with ExitStack() as stack, kernel_setting(stage.train.kernels), determinism(recipe):
        stack.callback(shut_range)
        with kernel_setting(recipe.train.kernels):  # as the run noted it
            changed = _changed(run, environment(accelerator, section))
        report = ReplayReport(name, progress.step, end, environment=changed)
        set_seed(recipe.seed)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vlm-tune-replay-")))
        stop = stack.enter_context(stop_requests())
        watch = stack.enter_context(Watch(accelerator, recipe.train.timeout))
        context = Context(
            recipe, scratch, accelerator, show or (lambda event: None), stop, "", watch, section
        )
        rows = read_rows(context, number, name, stage, build_processor(recipe, [], saved=start))
        _check_data(context, run, number, stage_fingerprint(stage, rows))
        model = restored_model(context, start, context.device, VisionLanguageNetwork)
        loop = stage_loop(context, model, name, stage, rows, progress, start)
        _replay(report, loop, folder, scratch)
        if accelerator.is_main_process:
            _compare(report, read_trace(folder), read_trace(scratch))
    report.seconds = round(time.perf_counter() - started, 2)
    return report


def _check_data(context: Context, run: Path, number: int, fingerprint: dict[str, Any]) -> None:
    """Raises `DataError` if a stage's data is not what the run trained on."""
    differences = data_differences(run, {number: fingerprint}, context.note)
    if differences:
        raise changed_data(differences, "restore it: the replay needs the run's data")


def _check_processes(run: Path, then: int, now: int) -> None:
    """Raises `RecipeError` if the run was trained by another number of processes."""
    if now != then:
        many = f"--processes {then}" if then > 1 else "one process alone"
        hint = f"the run was trained by {then} processes, this is {now}; replay it with {many}"
        raise RecipeError([Problem(shown_path(run), hint)])


def _replay(report: ReplayReport, loop: StageLoop, folder: Path, scratch: Path) -> None:
    """Repeats the report's steps and compares with the stage's whole checkpoints on the way.

    `folder` is the stage's, and `scratch` takes the trace of the replay.
    """
    saved = {
        step_of(path): path
        for path in checkpoints(folder)
        if report.start < step_of(path) <= report.end and is_whole(path)
    }
    for step, written in loop.replay(report.end, scratch, set(saved)):
        report.checkpoints.append(step)
        report.tensors[step] = different_tensors(saved[step], written)


def _span(run: Path, names: list[str], steps: int | None) -> tuple[int, Path, int]:
    """The stage's number, the checkpoint to start from, and the last step to do."""
    for number in reversed(range(len(names))):
        folder = stage_folder(run, number, names[number])
        done = max((step.step for step in read_trace(folder)), default=0)
        whole = [path for path in checkpoints(folder) if step_of(path) <= done and is_whole(path)]
        if steps is None:
            for before, after in reversed(list(pairwise(whole))):
                return number, before, step_of(after)
        for path in reversed(whole):
            if step_of(path) < done and done - step_of(path) >= (steps or 1):
                return number, path, done if steps is None else step_of(path) + steps
    what = f"{steps} steps" if steps else "any step"
    raise RecipeError(
        [
            Problem(
                str(run),
                f"no complete checkpoint is kept that {what} were made after; "
                "train.checkpoints.keep says how many are",
            )
        ]
    )


def _changed(run: Path, now: dict[str, Any]) -> dict[str, list[Any]]:
    then: dict[str, Any] = {}
    path = run / "log.jsonl"
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("event") == "environment":
            then = event
    return {
        key: [then[key], value] for key, value in now.items() if key in then and then[key] != value
    }


def different_tensors(first: Path, second: Path) -> list[str]:
    """The tensors of two folders that are not equal bit for bit, as `file|name`."""
    differing = []
    for name in sorted(
        {
            str(path.relative_to(folder))
            for folder in (first, second)
            for path in folder.rglob("*.safetensors")
        }
    ):
        one, two = (
            read_safetensors(folder / name) if (folder / name).is_file() else {}
            for folder in (first, second)
        )
        for key in sorted(one.keys() | two.keys()):
            if key not in one or key not in two or not _same_bits(one[key], two[key]):
                differing.append(f"{name}|{key}")
    return differing


def _same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    return torch.equal(
        one.contiguous().flatten().view(torch.uint8), two.contiguous().flatten().view(torch.uint8)
    )


def _compare(report: ReplayReport, run: list[Step], replay: list[Step]) -> None:
    before = {step.step: step for step in run}
    pairs = [(before[step.step], step) for step in replay if step.step in before]
    for what in ("samples", "loss", "norm"):
        report.compared.append(what)
        first = next(
            ((one, two) for one, two in pairs if getattr(one, what) != getattr(two, what)), None
        )
        if first is not None:
            report.differences.append(
                Difference(what, first[0].step, getattr(first[0], what), getattr(first[1], what))
            )
