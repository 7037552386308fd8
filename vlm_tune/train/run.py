"""A whole run: stages in order, resumed where they stopped, the finished model scored once on the test part."""

from __future__ import annotations

import json
import logging
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed

from vlm_tune.config.changes import recipe_changes
from vlm_tune.config.engine import AnyEngine
from vlm_tune.config.load import dump_recipe, load_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.prepare.run import scratch_texts
from vlm_tune.data.types import Conversation, distinct_media
from vlm_tune.errors import Interrupted, TrainingError, VlmTuneError
from vlm_tune.evaluation.evaluate import Scores, score
from vlm_tune.kernels.cpu.native import kernel_status
from vlm_tune.model.base_weights import recipe_choice
from vlm_tune.model.build import build, build_processor, load_dtype, trained_later
from vlm_tune.model.build_checks import check_model
from vlm_tune.model.checkpoint import recover_folders, restore_model, save_model
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.tuning import TuneRow, apply_rules, check_fits
from vlm_tune.model.vision.feature_cache import tower_features
from vlm_tune.model.vlm import VisionLanguageModel
from vlm_tune.model.weights import own_memory, page_out
from vlm_tune.paths import reason
from vlm_tune.precision import DTYPES
from vlm_tune.rendering.report import write_report
from vlm_tune.resources import cache_folder
from vlm_tune.run_folder import check_present, check_run, keep_recipe, open_run, retire_result
from vlm_tune.run_lock import run_lock
from vlm_tune.train.accelerator import MIXED, accelerator_of
from vlm_tune.train.allocator import forget_old_kernels, keep_freed_memory, return_freed_memory, shut_range, trim_heap
from vlm_tune.train.checkpoint import Progress, best_checkpoint, last_checkpoint, read_progress, stage_folder, step_folder, step_of
from vlm_tune.train.engines.base import shards
from vlm_tune.train.engines.registry import build_engine, resolve_engine
from vlm_tune.train.environment import environment
from vlm_tune.train.resuming import changed_data, damaged_only, data_differences, earlier_seconds, forget_after, read_json, write_data
from vlm_tune.train.signals import stop_requests
from vlm_tune.train.stage_data import StageRows, caches_features, image_cost, read_stage, stage_features, stage_feed, stage_fingerprint
from vlm_tune.train.trackers import Trackers
from vlm_tune.train.trainer import Report, StageData, StageLoop
from vlm_tune.train.watchdog import Watch

log = logging.getLogger(__name__)
"""What is told when it begins, for it may take long."""


@dataclass
class Run:
    """A finished run: its folder, the result written there, and the model."""

    folder: Path
    result: dict[str, Any]
    model: VisionLanguageModel = field(repr=False)


@dataclass
class Context:
    """What the steps of a run share."""

    recipe: Recipe
    run: Path
    accelerator: Accelerator
    report: Report
    stop: Callable[[], bool]
    text: str
    watch: Watch
    section: AnyEngine
    resumed: bool = False
    accepts: bool = False
    """Whether a resumed run goes on though recipe or data have changed."""
    data: list[dict[str, Any]] = field(default_factory=list)
    """The fingerprints of what the stages read; the first process's alone."""

    def note(self, text: str) -> None:
        """Reports what the user should know."""
        self.report({"event": "note", "text": text})

    @property
    def holds(self) -> bool:
        """Whether this process holds the language model before an engine takes it; of those that shard it the first alone does."""
        return self.accelerator.is_main_process or not shards(self.section)


def sft(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    accept_changes: bool = False,
    test: bool = True,
    show: Report | None = None,
) -> Run:
    """Trains what the recipe says and returns the run; `show` is given every event as it happens.

    Without `test` the test part is read, as ever before training, but not scored.

    The folder gets recipe.yaml, log.jsonl, stages/ with checkpoints, model/ (the finished model), result.json and
    report.html. Raises `RecipeError` for a folder that is in use or holds another recipe's run (unless a resumed run is
    to `accept_changes`), `DataError`, `ModelError`, `TrainingError`, and `Interrupted` after a checkpoint when asked to stop.
    """
    run, text = Path(recipe.output), dump_recipe(recipe)
    kernels = kernel_status()
    check_model(recipe)  # before anything is written
    forget_old_kernels()
    return_freed_memory()
    section = resolve_engine(recipe.engine)
    accelerator = accelerator_of(recipe)
    with ExitStack() as stack:
        stack.callback(shut_range)
        stop = stack.enter_context(stop_requests())
        watch = stack.enter_context(Watch(accelerator, recipe.train.timeout))
        options = {"resume": resume, "overwrite": overwrite, "accept_changes": accept_changes}
        notes = _together(accelerator, lambda: _open(stack, run, recipe, text, **options))
        set_seed(recipe.seed)
        started = time.perf_counter()
        report = stack.enter_context(_log(run, accelerator, recipe, text, show, watch))
        report({"event": "environment", **environment(accelerator, section), "kernels_reason": str(kernels)})
        for note in notes or []:
            report({"event": "note", "text": note})
        context = Context(recipe, run, accelerator, report, stop, text, watch, section, resumed=resume, accepts=accept_changes)
        try:
            model, seconds, rows = _stages(context)
            result = _finish(context, model, rows if test else [], {"seconds": seconds})
            result["seconds_total"] = round(time.perf_counter() - started, 2)
            if accelerator.is_main_process:
                (run / "result.json").write_text(json.dumps(result, indent=2))
                write_report(run)
        except RuntimeError as error:
            lost = watch.lost(error)
            raise error if lost is None else lost from error
        except OSError as error:
            raise _file_fault(run, error) from error
    return Run(run, result, model)


def _open(stack: ExitStack, run: Path, recipe: Recipe, text: str, *, resume: bool, **options: bool) -> list[str]:
    """Takes the run's folder until the stack ends; what is to be told of it."""
    check_run(run, recipe, resume=resume, **options)
    notes = [note for note in [stack.enter_context(run_lock(run))] if note is not None]
    notes += open_run(run, recipe, text, resume=resume, **options)
    for folder in (run, *run.glob("stages/*/checkpoints")):
        recover_folders(folder)
    return notes


def _file_fault(run: Path, error: OSError) -> BaseException:
    """The error that tells of a file system's fault in the run's folder; a fault of another place as it is."""
    try:
        check_present(run)
    except TrainingError as gone:
        return gone
    if error.filename is None or not Path(str(error.filename)).is_relative_to(run):
        return error
    return TrainingError(f"{error.filename}: {reason(error)}; the last checkpoint is kept: --resume goes on from there")


def _together(accelerator: Accelerator, act: Callable[[], list[str]]) -> list[str] | None:
    """What the first process does for all; its error is everyone's."""
    done: list[str] | None = None
    failure: VlmTuneError | None = None
    if accelerator.is_main_process:
        try:
            done = act()
        except VlmTuneError as error:
            failure = error
    told = broadcast_object_list([None if failure is None else (str(failure), failure.exit_code)])[0]
    if failure is not None:
        raise failure
    if told is not None:
        elsewhere = VlmTuneError(f"rank 0: {told[0]}")
        elsewhere.exit_code = told[1]
        raise elsewhere
    return done


# --- the folder ------------------------------------------------------------------------------------------------------


@contextmanager
def _log(run: Path, accelerator: Accelerator, recipe: Recipe, text: str, show: Report | None, watch: Watch) -> Any:
    """Gives a function that writes an event to log.jsonl, shows it, and passes its figures to the trackers."""
    path = run / "log.jsonl"
    trackers: Trackers | None = None

    def report(event: dict[str, Any]) -> None:
        watch.at(event["event"])
        if not accelerator.is_main_process:
            return
        check_present(run)
        event = {**event, "time": time.time()}
        with path.open("a") as file:
            file.write(json.dumps(event) + "\n")
        if trackers is not None and event["event"] in ("train", "evaluate"):
            figures = {f"{event['event']}/{key}": value for key, value in event.items() if isinstance(value, int | float)}
            trackers.log(figures, step=event["step"])
        if show:
            show(event)

    if accelerator.is_main_process and recipe.train.trackers:
        told = lambda note: report({"event": "note", "text": f"tracker {note}"})  # noqa: E731
        trackers = Trackers(recipe.train.trackers, recipe.name, run, {"recipe": text}, told)
    try:
        yield report
    finally:
        if trackers is not None:
            trackers.close()


# --- the stages ------------------------------------------------------------------------------------------------------


def _stages(context: Context) -> tuple[VisionLanguageModel, float, list[Conversation]]:
    """Runs the stages that are left; the model as the last one leaves it, the seconds of all, and the rows of test."""
    recipe, stages = context.recipe, context.recipe.resolved_stages()
    log.info("reading the rows")
    names, main = [name for name, _ in stages], context.accelerator.is_main_process
    checkpoint = _checkpoint(context, names) if context.resumed else None
    texts = [] if checkpoint else scratch_texts(recipe)
    # Data first: a bad row is told before any weights are loaded.
    processor = build_processor(recipe, texts, saved=checkpoint)
    rows = [read_rows(context, number, name, stage, processor) for number, (name, stage) in enumerate(stages)]
    log.info("making the model")
    samples, progress = rows[-1].samples, Progress()
    if main:
        context.data = [stage_fingerprint(stage, own) for (_, stage), own in zip(stages, rows, strict=True)]
    if checkpoint:
        for line in _together(context.accelerator, lambda: _changed_data(context)) or []:
            context.note(f"resumed with changed data: {line}")
        progress = read_progress(checkpoint)
        if main:
            forget_after(context.run, progress)
        model = restore_model(checkpoint, dtype=load_dtype(recipe), bare=not context.holds, base=recipe_choice(recipe))
    else:
        if main:
            write_data(context.run, context.data)
        model = build(recipe, texts, bare=not context.holds)
        if main:
            log.info("answering the report's samples before training")
            _write_samples(context, model, samples, "before")
    for (_, stage), own in zip(stages[progress.stage :], rows[progress.stage :], strict=True):
        if own.train is not None:
            check_fits(model.llm, own.train, stage.tune)
    seconds = earlier_seconds(context.run, names[: progress.stage], context.note) if main else 0.0
    for number in range(progress.stage, len(stages)):
        name, stage = stages[number]
        if checkpoint is None or number > progress.stage:
            progress, checkpoint = Progress(stage=number, ranks=progress.ranks), None
        progress.ranks = progress.ranks or context.accelerator.num_processes
        model = _stage(context, model, name, stage, rows[number], progress, checkpoint)
        seconds += progress.seconds
    if main:
        _write_samples(context, model, samples, "after")
    return model, seconds, rows[-1].test


def _checkpoint(context: Context, names: list[str]) -> Path | None:
    """The checkpoint that a resumed run goes on from; None where none is whole."""
    newest = last_checkpoint(context.run, names)
    if newest is None:
        damaged = ", ".join(damaged_only(context.run, names))
        context.note(f"there is no whole checkpoint{f' (damaged: {damaged})' if damaged else ''}: the run begins anew")
        if context.accelerator.is_main_process:
            forget_after(context.run, Progress())
            keep_recipe(context.run, context.text)
        return None
    checkpoint, damaged = newest
    for folder in damaged:
        context.note(f"{folder.name} of {folder.parent.parent.name} is damaged; going on from {checkpoint.name}")
    return checkpoint


def _changed_data(context: Context) -> list[str]:
    """What of the data is not as it was. Raises `DataError` if that is not accepted."""
    differences = data_differences(context.run, dict(enumerate(context.data)), context.note)
    if differences and not context.accepts:
        raise changed_data(differences, "put it back, or go on with it by --resume --accept-changes, or start another run")
    return differences


def _begin_work(context: Context, loop: StageLoop) -> None:
    """Once a resumed run's checkpoint is loaded: keeps its recipe and data as they are now, and puts an old result aside."""
    if not context.resumed:
        return
    if recipe_changes(load_recipe(context.run / "recipe.yaml"), context.recipe):
        keep_recipe(context.run, context.text)
    write_data(context.run, context.data)
    if loop.total > loop.progress.step and (note := retire_result(context.run)):
        context.note(note)


def read_rows(context: Context, number: int, name: str, recipe: Recipe, processor: Processor) -> StageRows:
    """What a stage reads, with its own chat format and system text."""
    data, common = recipe.data, context.recipe.data
    return read_stage(
        recipe,
        processor.variant(data.template if data.template != common.template else None, data.system),
        last=number == len(context.recipe.stages or [recipe]) - 1,
        report=lambda event: context.report({**event, "stage": number, "name": name}),
        stop=context.stop,
        quarantine=context.run / "quarantine.jsonl" if context.accelerator.is_main_process else None,
    )


def stage_loop(
    context: Context,
    model: VisionLanguageModel,
    name: str,
    recipe: Recipe,
    rows: StageRows,
    progress: Progress,
    checkpoint: Path | None,
) -> StageLoop:
    """The loop that trains one stage, from its checkpoint where it has one."""
    accelerator, folder = context.accelerator, stage_folder(context.run, progress.stage, name)

    def report(event: dict[str, Any]) -> None:
        if event["event"] == "features" and context.stop():
            raise Interrupted("stopped before the first step; go on with --resume")
        context.report({**event, "stage": progress.stage, "name": name})

    train, validation = rows.train, rows.validation
    tuned = apply_rules(model, recipe.tune, **_tuning(context, recipe, progress.stage))
    for part in (model.tower, model.connector) if shards(context.section) else (model,):
        part.to(accelerator.device)
    media, on_cpu = train.media if train else [], accelerator.device.type == "cpu"
    # A tower that no step reads needs no memory then; the engines of several processes send its weights around.
    pages_out = on_cpu and accelerator.num_processes == 1 and caches_features(recipe, model, media)
    if on_cpu:
        for part in (model.connector, model.llm) if pages_out else (model,):
            own_memory(part)
        keep_freed_memory()
    _tuning_table(context, progress.stage, name, tuned.table)
    features, held_out = stage_features(recipe, model, media, validation, report)
    if pages_out:
        try:
            page_out(model.tower, cache_folder("features"))
        except OSError:  # there is no room for the file
            own_memory(model.tower)
    if on_cpu:
        trim_heap()
    cost = image_cost(model, cached=features is not None)
    feed = stage_feed(recipe, rows, features, accelerator, report, planned=progress.ranks, image_cost=cost)
    data = StageData(feed, validation, held_out, cost)
    loop = StageLoop(
        model,
        recipe,
        tuned,
        data,
        build_engine(context.section, accelerator),
        folder=folder,
        progress=progress,
        report=report,
        recipe_text=context.text,
        stop=context.stop,
        resume_from=checkpoint,
        watch=context.watch,
    )
    sizes = {"questions": train.questions, "images": len(train.media), "left_out": train.left_out} if train else {"streaming": True}
    report({"event": "stage", "steps": loop.total, "from_step": progress.step, **sizes})
    return loop


def _tuning(context: Context, recipe: Recipe, stage: int) -> dict[str, Any]:
    exact = trained_later(context.recipe, stage)
    return {"learning_rate": recipe.train.learning_rate, "precision": DTYPES[recipe.train.precision], "exact": exact}


def _stage(
    context: Context,
    model: VisionLanguageModel,
    name: str,
    recipe: Recipe,
    rows: StageRows,
    progress: Progress,
    checkpoint: Path | None,
) -> VisionLanguageModel:
    """Trains one stage and returns the model with the weights of its best checkpoint."""
    started = time.perf_counter()
    if context.accelerator.mixed_precision != MIXED[recipe.train.precision]:
        context.accelerator = accelerator_of(recipe)
    accelerator, folder = context.accelerator, stage_folder(context.run, progress.stage, name)
    loop = stage_loop(context, model, name, recipe, rows, progress, checkpoint)
    if accelerator.is_main_process:
        _begin_work(context, loop)
    preparing = time.perf_counter() - started
    loop.run()
    progress.seconds += preparing
    on_cpu = accelerator.device.type == "cpu"
    if on_cpu:
        # What the steps took goes back before a model is made anew or answers with a tower that was not in memory.
        return_freed_memory()
    loop.engine.release()
    best = _best(context, folder, progress)
    shares = best is None and loop.engine.sharded
    if shares:
        # What the ranks hold in shares is whole in the last checkpoint.
        accelerator.wait_for_everyone()
        best = step_folder(folder, progress.step)
    if best is not None:
        # A model that other engines keep as it is: the next stage draws the random numbers that it would have.
        with torch.random.fork_rng(devices=[], enabled=shares):
            base = recipe_choice(context.recipe)
            model = restore_model(best, dtype=load_dtype(context.recipe), bare=not context.holds, base=base)
            apply_rules(model, recipe.tune, **_tuning(context, recipe, progress.stage))
        if context.holds:
            model.to(accelerator.device)
    if on_cpu:
        keep_freed_memory()
    if accelerator.is_main_process:
        (folder / "done.json").write_text(json.dumps(asdict(progress), indent=1))
    return model


def _best(context: Context, folder: Path, progress: Progress) -> Path | None:
    """The best checkpoint that is whole; None where that is the model as it is."""
    if progress.best_step is None:
        return None
    found, damaged = best_checkpoint(folder, progress)
    found = broadcast_object_list([found])[0]
    for checkpoint in damaged:
        context.report({"event": "note", "text": f"{checkpoint.name} of {folder.name}, which scored better, is damaged: passed over"})
    progress.best_step, progress.best_score = (progress.step, None) if found is None else (step_of(found[0]), found[1])
    if found is None or progress.best_step == progress.step:
        return None
    text = f"going on with the best checkpoint, step {progress.best_step} (score {progress.best_score:.4f})"
    context.report({"event": "note", "text": text})
    return found[0]


def _tuning_table(context: Context, number: int, name: str, table: Sequence[TuneRow]) -> None:
    """Shows a stage's tuning table and keeps it in tuning.json, beside those of the stages before."""
    rows = [asdict(row) for row in table]
    context.report({"event": "tuning", "stage": number, "name": name, "rows": rows})
    if context.accelerator.is_main_process:
        path = context.run / "tuning.json"
        tables = read_json(path, list, context.note, "the tables of earlier stages are lost") or []
        path.write_text(json.dumps([*tables[:number], {"stage": name, "rows": rows}], indent=1))


# --- the end ---------------------------------------------------------------------------------------------------------


def _finish(context: Context, model: VisionLanguageModel, rows: Sequence[Conversation], result: dict[str, Any]) -> dict[str, Any]:
    """Saves the finished model, scores it on rows of the test part, and fills the result."""
    recipe, accelerator = context.recipe.resolved_stages()[-1][1], context.accelerator
    if accelerator.is_main_process:
        check_present(context.run)
        log.info("saving the model")
        save_model(model, context.run / "model")
        rows = rows[: recipe.evaluate.test_limit]
        if rows:
            started = time.perf_counter()
            found = _score_rows(context, model, rows, recipe)
            result |= {name: getattr(found, name) for name in ("accuracy", "n", "by_category", "by_source")}
            result["seconds_test"] = round(time.perf_counter() - started, 2)
            context.report({"event": "test", **found.summary()})
            lines = "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in found.answers)
            (context.run / "answers.jsonl").write_text(lines, encoding="utf-8")
    result["seconds"] = round(result["seconds"], 2)
    result["peak_memory_mb"] = peak_memory_mb()
    return result


def _score_rows(context: Context, model: VisionLanguageModel, rows: Sequence[Conversation], recipe: Recipe) -> Scores:
    """Scores rows as the recipe's evaluate section says. Raises `Interrupted` when asked to stop."""
    settings = recipe.evaluate
    media = distinct_media(rows)

    def progress(done: int, of: int) -> None:
        context.report({"event": "scoring", "done": done, "of": of})
        if context.stop():
            raise Interrupted("stopped: the model is trained, the test part is not scored yet; --resume does that")

    with context.accelerator.autocast():
        note = lambda text: context.report({"event": "note", "text": text})  # noqa: E731
        features = tower_features(model, media, note=note) if media else None
        return score(
            model,
            rows,
            decoding=Decoding(settings.max_new_tokens, settings.num_beams),
            batch_size=settings.batch_size,
            features=features,
            loss=False,
            compile=recipe.train.compile,
            progress=progress,
        )


def _write_samples(context: Context, model: VisionLanguageModel, rows: Sequence[Conversation], column: str) -> None:
    """Adds the model's answers to samples.json under `before` or `after`."""
    if not rows:
        return
    recipe = context.recipe.resolved_stages()[-1][1]
    path = context.run / "samples.json"
    entries = read_json(path, list, context.note, "the answers before training are lost") or []
    known = {entry["id"]: entry for entry in entries if isinstance(entry, dict) and "id" in entry}
    with context.accelerator.autocast():
        answers = score(model, rows, decoding=Decoding(recipe.evaluate.max_new_tokens), batch_size=16, loss=False).answers
    table = []
    for answer in answers:
        entry = known.get(answer.id) or {"id": answer.id, "image": answer.image, "question": answer.question, "expected": answer.expected}
        table.append({"before": None, "after": None, **entry, column: answer.generated})
    path.write_text(json.dumps(table, indent=1, ensure_ascii=False))


def peak_memory_mb() -> int:
    """The process's largest resident set so far, in MB (10^6 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 // 1_000_000
