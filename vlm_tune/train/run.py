"""A whole run: its stages in order, resuming, and the scoring of the model on the test part."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed

from vlm_tune.config.load import dump_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.prepare.run import scratch_texts
from vlm_tune.data.sources.registry import open_source
from vlm_tune.data.types import Conversation
from vlm_tune.errors import TrainingError, VlmTuneError
from vlm_tune.evaluation.registry import check_metrics
from vlm_tune.evaluation.rewards import check_rewards
from vlm_tune.events import Environment, Evaluation, Event, Note, Report, TrainSteps
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.kernels.cpu.native import kernel_status
from vlm_tune.model.build import build, build_processor, planned_config
from vlm_tune.model.build_checks import check_model
from vlm_tune.model.committed_folders import recover_folders
from vlm_tune.model.tuning import check_fits
from vlm_tune.paths import reason
from vlm_tune.resources import kernel_setting
from vlm_tune.run_folder import MARK, check_present, check_run, keep_recipe, open_run
from vlm_tune.run_lock import run_lock
from vlm_tune.train.accelerator import accelerator_of, precision_notes
from vlm_tune.train.allocator import forget_old_kernels, return_freed_memory, shut_range
from vlm_tune.train.checkpoint import Progress, last_checkpoint, read_progress
from vlm_tune.train.deterministic import determinism, nondeterministic
from vlm_tune.train.engines.registry import engine_of
from vlm_tune.train.environment import environment
from vlm_tune.train.final_scores import answer_others, save_and_score, write_result, write_samples
from vlm_tune.train.forgetting import other_rows
from vlm_tune.train.resuming import (
    changed_data,
    damaged_only,
    data_differences,
    earlier_seconds,
    forget_after,
    write_data,
)
from vlm_tune.train.signals import stop_requests
from vlm_tune.train.stage import (
    Context,
    best_model,
    end_stage,
    read_rows,
    restored_model,
    train_stage,
)
from vlm_tune.train.stage_data import StageRows, stage_fingerprint
from vlm_tune.train.trackers import Trackers
from vlm_tune.train.watchdog import Watch

log = logging.getLogger(__name__)
"""Logs the start of work that may take long."""


@dataclass
class Run:
    """A finished run: its folder, the result written there, and the model."""

    folder: Path
    result: dict[str, Any]
    model: VisionLanguageModel = field(repr=False)


def sft(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    accept_changes: bool = False,
    test: bool = True,
    show: Report | None = None,
    write_report: Callable[[Path], object],
) -> Run:
    """Trains by the recipe and returns the finished run.

    The run's folder gets recipe.yaml, log.jsonl, stages/, model/, result.json and report.html.

    Args:
        resume: Continue the run in the folder from its last whole checkpoint.
        overwrite: Replace a run in the folder.
        accept_changes: Resume even if recipe or data have changed.
        test: Score the model on the test part. If not, its rows are still read before training.
        show: Called with every event as it happens.
        write_report: Called by rank 0 with the finished run's folder.

    Raises:
        RecipeError: If the folder is in use or holds another recipe's run.
        DataError: If the data can't be used.
        ModelError: If the model can't be built or restored.
        TrainingError: If training fails.
        Interrupted: If asked to stop; a checkpoint is written first.
    """
    run = Path(recipe.output)
    text = dump_recipe(recipe)
    with ExitStack() as stack, kernel_setting(recipe.train.kernels), determinism(recipe):
        kernels = _check_machine(recipe)
        if overwrite and (run / MARK).is_file():
            _check_inputs(recipe)
        section = engine_of(recipe)
        accelerator = accelerator_of(recipe)
        stack.callback(shut_range)
        stop = stack.enter_context(stop_requests())
        watch = stack.enter_context(Watch(accelerator, recipe.train.timeout))
        options = {"resume": resume, "overwrite": overwrite, "accept_changes": accept_changes}
        notes = _together(accelerator, lambda: _open(stack, run, recipe, text, **options))
        set_seed(recipe.seed)
        started = time.perf_counter()
        report = stack.enter_context(_log(run, accelerator, recipe, text, show, watch))
        notes = [*(notes or []), *precision_notes(recipe, accelerator.device)]
        _report_start(report, environment(accelerator, section), kernels, notes)
        context = Context(
            recipe,
            run,
            accelerator,
            report,
            stop,
            text,
            watch,
            section,
            resumed=resume,
            accepts=accept_changes,
        )
        return _train_and_score(context, started, write_report, test=test)


def _check_machine(recipe: Recipe) -> str:
    """Checks kernels, model, metrics and rewards before anything is written.

    Returns what computes and why.
    """
    for _, stage in recipe.resolved_stages():
        with kernel_setting(stage.train.kernels):
            kernel_status()
        check_metrics(stage.evaluate.metrics)
        check_rewards([stage.objective])
    kernels = str(kernel_status())
    check_model(recipe)
    forget_old_kernels()
    return_freed_memory()
    return kernels


def _check_inputs(recipe: Recipe) -> None:
    """Opens all sources and reads the model's configs.

    That is done before a run is deleted: a mistaken name would else cost a finished model.

    Raises:
        DataError: A source can't be opened.
        ModelError: A name of a model is unknown.
    """
    planned_config(recipe)
    for _, stage in recipe.resolved_stages():
        for source in (*stage.data.train, *stage.data.validation, *stage.data.test):
            open_source(source, seed=stage.seed)


def _report_start(
    report: Report, values: dict[str, Any], kernels_reason: str, notes: list[str]
) -> None:
    """Reports the environment that the run's numbers depend on, and the notes on its folder."""
    report(Environment(values, kernels_reason))
    for note in notes:
        report(Note(note))


def _train_and_score(
    context: Context, started: float, write_report: Callable[[Path], object], *, test: bool
) -> Run:
    """Runs the stages, scores the model and writes result.json and the report.

    A failed collective becomes the error that names the lost processes, an operation that can't be
    deterministic a `TrainingError`, and a failed file operation that of `_file_fault`.
    """
    run = context.run
    try:
        model, seconds, rows = _stages(context)
        with kernel_setting(context.recipe.last_stage.train.kernels):
            result = save_and_score(context, model, rows if test else None, {"seconds": seconds})
        result["seconds_total"] = round(time.perf_counter() - started, 2)
        if context.accelerator.is_main_process:
            write_result(run, result)
            write_report(run)
    except RuntimeError as error:
        lost = context.watch.lost(error) or nondeterministic(error)
        raise error if lost is None else lost from error
    except OSError as error:
        raise _file_fault(run, error) from error
    return Run(run, result, model)


def _open(
    stack: ExitStack, run: Path, recipe: Recipe, text: str, *, resume: bool, **options: bool
) -> list[str]:
    """Locks and opens the run's folder until the stack is closed; returns notes for the user."""
    check_run(run, recipe, resume=resume, **options)
    notes = [note for note in [stack.enter_context(run_lock(run))] if note is not None]
    notes += open_run(run, recipe, text, resume=resume, **options)
    for folder in (run, *run.glob("stages/*/checkpoints")):
        recover_folders(folder)
    return notes


def _file_fault(run: Path, error: OSError) -> BaseException:
    """The error to raise for a failed file operation.

    It is a `TrainingError` if the file is in the run's folder or the folder is gone, else `error`
    itself.
    """
    try:
        check_present(run)
    except TrainingError as gone:
        return gone
    if error.filename is None or not Path(str(error.filename)).is_relative_to(run):
        return error
    return TrainingError(
        f"{error.filename}: {reason(error)}; the last checkpoint is kept: --resume continues "
        "from there"
    )


def _together(accelerator: Accelerator, act: Callable[[], list[str]]) -> list[str] | None:
    """Runs `act` on rank 0 and returns its list there, None on other ranks.

    A `VlmTuneError` of rank 0 is raised on every rank.
    """
    done: list[str] | None = None
    failure: VlmTuneError | None = None
    if accelerator.is_main_process:
        try:
            done = act()
        except VlmTuneError as error:
            failure = error
    fault = broadcast_object_list([None if failure is None else (str(failure), failure.exit_code)])[
        0
    ]
    if failure is not None:
        raise failure
    if fault is not None:
        elsewhere = VlmTuneError(f"rank 0: {fault[0]}")
        elsewhere.exit_code = fault[1]
        raise elsewhere
    return done


@contextmanager
def _log(
    run: Path,
    accelerator: Accelerator,
    recipe: Recipe,
    text: str,
    show: Report | None,
    watch: Watch,
) -> Any:
    """Yields a function that reports an event.

    It writes the event to log.jsonl, passes it to `show` and its figures to the trackers.
    """
    path = run / "log.jsonl"
    trackers: Trackers | None = None

    def report(event: Event) -> None:
        watch.at(event.kind)
        if not accelerator.is_main_process:
            return
        check_present(run)
        line = {**event.line(), "time": time.time()}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if trackers is not None and isinstance(event, TrainSteps | Evaluation):
            figures = {
                f"{event.kind}/{key}": value
                for key, value in (line | (event.metrics or {})).items()
                if isinstance(value, int | float)
            }
            if isinstance(event, Evaluation):
                scores = event.figures.items()
                figures |= {
                    f"evaluate/{name}": score for name, score in scores if score is not None
                }
            trackers.log(figures, step=event.step)
        if show:
            show(event)

    if accelerator.is_main_process and recipe.train.trackers:
        trackers = Trackers(
            recipe.train.trackers,
            recipe.name,
            run,
            {"recipe": text},
            lambda note: report(Note(f"tracker {note}")),
        )
    try:
        yield report
    finally:
        if trackers is not None:
            trackers.close()


def _stages(context: Context) -> tuple[VisionLanguageModel, float, StageRows]:
    """Runs the stages that are left.

    Returns the model after the last stage, the seconds of all stages, and the last stage's rows.
    """
    recipe = context.recipe
    stages = context.recipe.resolved_stages()
    log.info("reading the rows")
    names = [name for name, _ in stages]
    main = context.accelerator.is_main_process
    checkpoint = _checkpoint(context, names) if context.resumed else None
    texts = [] if checkpoint else scratch_texts(recipe)
    # Data first: a bad row is reported before any weights are loaded.
    processor = build_processor(recipe, texts, saved=checkpoint)
    rows = [
        read_rows(context, number, name, stage, processor)
        for number, (name, stage) in enumerate(stages)
    ]
    others = other_rows(stages[-1][1])
    log.info("building the model")
    samples = rows[-1].samples
    if main:
        context.data = [
            stage_fingerprint(stage, stage_rows)
            for (_, stage), stage_rows in zip(stages, rows, strict=True)
        ]
    if checkpoint:
        model, progress = _resumed_model(context, checkpoint)
    else:
        model, progress = _new_model(context, texts, samples, others), Progress()
    for (_, stage), stage_rows in zip(
        stages[progress.stage :], rows[progress.stage :], strict=True
    ):
        if stage_rows.train is not None:
            check_fits(model.llm, stage_rows.train, stage)
    seconds = earlier_seconds(context.run, names[: progress.stage], context.note) if main else 0.0
    for number in range(progress.stage, len(stages)):
        name, stage = stages[number]
        if checkpoint is None or number > progress.stage:
            progress = Progress(stage=number, ranks=progress.ranks)
            checkpoint = None
        progress.ranks = progress.ranks or context.accelerator.num_processes
        with kernel_setting(stage.train.kernels):
            best = train_stage(context, model, name, stage, rows[number], progress, checkpoint)
        if best is not None:
            del model
            model = best_model(context, best, stage, progress, VisionLanguageModel)
        end_stage(context, name, progress)
        seconds += progress.seconds
    if main:
        with kernel_setting(stages[-1][1].train.kernels):
            write_samples(context, model, samples, "after")
    return model, seconds, rows[-1]


def _resumed_model(context: Context, checkpoint: Path) -> tuple[VisionLanguageModel, Progress]:
    """The model and the progress of a checkpoint, after a check that the data is unchanged.

    The log's events after it are removed: they will be repeated.
    """
    for line in _together(context.accelerator, lambda: _changed_data(context)) or []:
        context.note(f"resumed with changed data: {line}")
    progress = read_progress(checkpoint)
    if context.accelerator.is_main_process:
        forget_after(context.run, progress)
    return restored_model(context, checkpoint, context.device, VisionLanguageModel), progress


def _new_model(
    context: Context,
    texts: list[Conversation],
    samples: list[Conversation],
    others: Mapping[str, list[Conversation]],
) -> VisionLanguageModel:
    """The recipe's model before its first step, which answers samples and rows of other tasks."""
    main = context.accelerator.is_main_process
    if main:
        write_data(context.run, context.data)
    model = build(
        context.recipe,
        texts,
        bare=not context.holds,
        device=context.device,
        model_class=VisionLanguageModel,
    )
    if main and samples:
        log.info("answering the report's samples before training")
        write_samples(context, model, samples, "before")
    if main and others:
        answer_others(context, model, others)
    return model


def _checkpoint(context: Context, names: list[str]) -> Path | None:
    """The checkpoint to resume from, with notes on damaged ones; None where none is whole."""
    newest = last_checkpoint(context.run, names)
    if newest is None:
        damaged = ", ".join(damaged_only(context.run, names))
        context.note(
            f"there is no complete checkpoint{f' (damaged: {damaged})' if damaged else ''}: the "
            "run starts over"
        )
        if context.accelerator.is_main_process:
            forget_after(context.run, Progress())
            keep_recipe(context.run, context.text)
        return None
    checkpoint, damaged = newest
    for folder in damaged:
        context.note(
            f"{folder.name} of {folder.parent.parent.name} is damaged; continuing from "
            f"{checkpoint.name}"
        )
    return checkpoint


def _changed_data(context: Context) -> list[str]:
    """Lines on the data that has changed since the run began.

    Raises `DataError` if there are any and changes are not accepted.
    """
    differences = data_differences(context.run, dict(enumerate(context.data)), context.note)
    if differences and not context.accepts:
        raise changed_data(
            differences,
            "restore it, or continue with --resume --accept-changes, or start another run",
        )
    return differences
