"""A whole run: stages in order, resumed where they stopped, the finished model scored once on the test part."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed

from vlm_tune.config import Recipe
from vlm_tune.data.prepare import conversations, read_part, scratch_texts
from vlm_tune.data.processor import Processor
from vlm_tune.data.types import Conversation, distinct_media
from vlm_tune.errors import TrainingError
from vlm_tune.evaluation import Scores, score
from vlm_tune.model.build import DTYPES, build, build_processor, load_dtype, trained_later
from vlm_tune.model.features import tower_features
from vlm_tune.model.llm import Decoding
from vlm_tune.model.store import restore_model, save_model
from vlm_tune.model.tuning import TuneRow, apply_rules
from vlm_tune.model.vlm import VisionLanguageModel
from vlm_tune.recipe import dump_recipe
from vlm_tune.report import write_report
from vlm_tune.runfolder import open_run
from vlm_tune.train.allocator import forget_old_kernels, keep_freed_memory
from vlm_tune.train.checkpoint import Progress, last_checkpoint, read_progress, stage_folder, step_folder
from vlm_tune.train.loop import Report, StageData, StageLoop
from vlm_tune.train.reading import StageRows, read_stage, stage_features, stage_feed

SAMPLED = 500
"""Rows that the report's samples are chosen from."""

MIXED = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}


@dataclass
class Run:
    """A finished run: its folder, the result written there, and the model."""

    folder: Path
    result: dict[str, Any]
    model: VisionLanguageModel = field(repr=False)


@dataclass
class _Context:
    """What the steps of a run share."""

    recipe: Recipe
    run: Path
    accelerator: Accelerator
    report: Report
    stop: Callable[[], bool]
    text: str


def sft(recipe: Recipe, *, resume: bool = False, overwrite: bool = False, show: Report | None = None) -> Run:
    """Trains what the recipe says and returns the run; `show` is given every event as it happens.

    The folder gets recipe.yaml, log.jsonl, stages/ with checkpoints, model/ (the finished model), result.json and
    report.html. Raises `RecipeError` for a folder that is in use or holds another recipe's run, `DataError`,
    `ModelError`, `TrainingError`, and `Interrupted` after a checkpoint when asked to stop.
    """
    run, text = Path(recipe.output), dump_recipe(recipe)
    forget_old_kernels()
    accelerator = _accelerator(recipe, run)
    if accelerator.is_main_process:
        open_run(run, recipe, text, resume=resume, overwrite=overwrite)
    accelerator.wait_for_everyone()
    set_seed(recipe.seed)
    if recipe.train.trackers:
        accelerator.init_trackers(recipe.name, config={"recipe": text})
    started = time.perf_counter()
    with _log(run, accelerator, show) as report, _signals() as stop:
        context = _Context(recipe, run, accelerator, report, stop, text)
        model, seconds = _stages(context, resume=resume)
        result = _finish(context, model, {"seconds": seconds})
    result["seconds_total"] = round(time.perf_counter() - started, 2)
    if accelerator.is_main_process:
        (run / "result.json").write_text(json.dumps(result, indent=2))
        write_report(run)
    if recipe.train.trackers:
        accelerator.end_training()
    return Run(run, result, model)


def _accelerator(recipe: Recipe, run: Path) -> Accelerator:
    """An accelerator in the recipe's precision. Raises `TrainingError` if it does not join all processes of a launch."""
    precision = MIXED[recipe.train.precision]
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        # accelerate keeps a process's first precision for good; another run, or the next stage, may ask for another.
        AcceleratorState._reset_state()
    found = Accelerator(
        # Without a GPU accelerate joins the processes of a launch only where it is told that the CPU is meant.
        cpu=not torch.accelerator.is_available() and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true",
        mixed_precision=precision,
        log_with=list(recipe.train.trackers) or None,
        project_dir=str(run),
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if found.num_processes != launched:
        raise TrainingError(f"{launched} processes were launched and accelerate joins {found.num_processes}")
    return found


# --- the folder ------------------------------------------------------------------------------------------------------


@contextmanager
def _log(run: Path, accelerator: Accelerator, show: Report | None) -> Any:
    """Gives a function that writes an event to log.jsonl, shows it, and passes its figures to the trackers."""
    path = run / "log.jsonl"

    def report(event: dict[str, Any]) -> None:
        if not accelerator.is_main_process:
            return
        event = {**event, "time": time.time()}
        with path.open("a") as file:
            file.write(json.dumps(event) + "\n")
        if accelerator.trackers and event["event"] in ("train", "evaluate"):
            figures = {f"{event['event']}/{key}": value for key, value in event.items() if isinstance(value, int | float)}
            accelerator.log(figures, step=event["step"])
        if show:
            show(event)

    yield report


@contextmanager
def _signals() -> Any:
    """Gives a function that says whether SIGINT or SIGTERM came; a second one ends the process at once."""
    asked = False

    def note(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            os._exit(130)
        asked = True
        print("stopping after this step (once more to leave at once)", file=sys.stderr)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are the caller's
        before = {}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _forget_after(run: Path, progress: Progress) -> None:
    """Removes from the log what a resumed run will do again."""
    path = run / "log.jsonl"
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        where = (event.get("stage", 0), event.get("step", 0))
        if where <= (progress.stage, progress.step):
            kept.append(line)
    path.write_text("".join(line + "\n" for line in kept))


# --- the stages ------------------------------------------------------------------------------------------------------


def _stages(context: _Context, *, resume: bool) -> tuple[VisionLanguageModel, float]:
    """Runs the stages that are left; the model as the last one leaves it, and the seconds of all."""
    recipe, stages = context.recipe, context.recipe.resolved_stages()
    texts = scratch_texts(recipe)
    # Data first: a bad row is told before any weights are loaded.
    processor = build_processor(recipe, texts)
    rows = [_read(context, number, name, stage, processor) for number, (name, stage) in enumerate(stages)]
    found = last_checkpoint(context.run, [name for name, _ in stages]) if resume else None
    progress, checkpoint = Progress(), None
    samples = _sample_rows(stages[-1][1], rows[-1].validation)
    if found:
        checkpoint, damaged = found
        progress = read_progress(checkpoint)
        for folder in damaged:
            context.report(
                {"event": "note", "text": f"{folder.name} of {folder.parent.parent.name} is damaged; going on from {checkpoint.name}"}
            )
        if context.accelerator.is_main_process:
            _forget_after(context.run, progress)
        model = restore_model(checkpoint, dtype=load_dtype(recipe))
    else:
        model = build(recipe, texts)
        if context.accelerator.is_main_process:
            _write_samples(context, model, samples, "before")
    seconds = sum(_earlier_seconds(context.run, stages[: progress.stage]))
    for number in range(progress.stage, len(stages)):
        name, stage = stages[number]
        if checkpoint is None or number > progress.stage:
            progress, checkpoint = Progress(stage=number), None
        model = _stage(context, model, name, stage, rows[number], progress, checkpoint)
        seconds += progress.seconds
    if context.accelerator.is_main_process:
        _write_samples(context, model, samples, "after")
    return model, seconds


def _read(context: _Context, number: int, name: str, recipe: Recipe, processor: Processor) -> StageRows:
    """What a stage reads, with its own chat format and system text."""
    data, common = recipe.data, context.recipe.data
    return read_stage(
        recipe,
        processor.variant(data.template if data.template != common.template else None, data.system),
        report=lambda event: context.report({**event, "stage": number, "name": name}),
        stop=context.stop,
        quarantine=context.run / "quarantine.jsonl" if context.accelerator.is_main_process else None,
    )


def _earlier_seconds(run: Path, stages: Sequence[tuple[str, Recipe]]) -> list[float]:
    found = []
    for number, (name, _) in enumerate(stages):
        done = stage_folder(run, number, name) / "done.json"
        found.append(json.loads(done.read_text())["seconds"] if done.is_file() else 0.0)
    return found


def _stage(
    context: _Context,
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
        context.accelerator = _accelerator(recipe, context.run)
    accelerator, folder = context.accelerator, stage_folder(context.run, progress.stage, name)

    def report(event: dict[str, Any]) -> None:
        context.report({**event, "stage": progress.stage, "name": name})

    train, validation = rows.train, rows.validation
    tuning: dict[str, Any] = {
        "learning_rate": recipe.train.learning_rate,
        "precision": DTYPES[recipe.train.precision],
        "exact": trained_later(context.recipe, progress.stage),
    }
    tuned = apply_rules(model, recipe.tune, **tuning)
    model.to(accelerator.device)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    _tuning_table(context, progress.stage, name, tuned.table)
    features, held_out = stage_features(recipe, model, train.media if train else [], validation, report)
    data = StageData(stage_feed(recipe, rows, features, accelerator, report), validation, held_out)
    loop = StageLoop(
        model,
        recipe,
        tuned,
        data,
        accelerator,
        folder=folder,
        progress=progress,
        report=report,
        recipe_text=context.text,
        stop=context.stop,
        resume_from=checkpoint,
    )
    sizes = {"questions": train.questions, "images": len(train.media), "left_out": train.left_out} if train else {"streaming": True}
    report({"event": "stage", "steps": loop.total, "from_step": progress.step, **sizes})
    preparing = time.perf_counter() - started
    loop.run()
    progress.seconds += preparing
    best = progress.best_step
    # Takes off the autocast that accelerate wrapped around `forward`: the next stage may train in another precision.
    accelerator.unwrap_model(loop.prepared_model, keep_fp32_wrapper=False)
    accelerator.free_memory()
    if best is not None and best != progress.step:
        report({"event": "note", "text": f"going on with the best checkpoint, step {best} (score {progress.best_score:.4f})"})
        model = restore_model(step_folder(folder, best), dtype=load_dtype(context.recipe)).to(accelerator.device)
        apply_rules(model, recipe.tune, **tuning)
    if accelerator.is_main_process:
        (folder / "done.json").write_text(json.dumps(asdict(progress), indent=1))
    return model


def _tuning_table(context: _Context, number: int, name: str, table: Sequence[TuneRow]) -> None:
    """Shows a stage's tuning table and keeps it in tuning.json, beside those of the stages before."""
    rows = [asdict(row) for row in table]
    context.report({"event": "tuning", "stage": number, "name": name, "rows": rows})
    if context.accelerator.is_main_process:
        path = context.run / "tuning.json"
        earlier = json.loads(path.read_text()) if path.is_file() else []
        path.write_text(json.dumps([*earlier[:number], {"stage": name, "rows": rows}], indent=1))


# --- the end ---------------------------------------------------------------------------------------------------------


def _finish(context: _Context, model: VisionLanguageModel, result: dict[str, Any]) -> dict[str, Any]:
    """Saves the finished model, scores it on the test part, and fills the result."""
    recipe, accelerator = context.recipe.resolved_stages()[-1][1], context.accelerator
    if accelerator.is_main_process:
        save_model(model, context.run / "model")
        rows = read_part(recipe.data, "test", model.processor, recipe.seed)
        if rows:
            started = time.perf_counter()
            found = score_rows(model, rows, recipe, accelerator, context.report)
            result |= {"accuracy": found.accuracy, "n": found.n, "by_answer_type": found.by_category}
            result["seconds_test"] = round(time.perf_counter() - started, 2)
            context.report({"event": "test", **found.summary()})
            (context.run / "answers.jsonl").write_text("".join(json.dumps(asdict(a), ensure_ascii=False) + "\n" for a in found.answers))
    result["seconds"] = round(result["seconds"], 2)
    result["peak_memory_mb"] = peak_memory_mb()
    return result


def score_rows(
    model: VisionLanguageModel, rows: Sequence[Conversation], recipe: Recipe, accelerator: Accelerator, report: Report
) -> Scores:
    """Scores rows as the recipe's evaluate section says."""
    settings = recipe.evaluate
    media = distinct_media(rows)
    with accelerator.autocast():
        features = tower_features(model, media) if media else None
        return score(
            model,
            rows,
            decoding=Decoding(settings.max_new_tokens, settings.num_beams),
            batch_size=settings.batch_size,
            features=features,
            loss=False,
            progress=lambda done, of: report({"event": "scoring", "done": done, "of": of}),
        )


def _sample_rows(last: Recipe, validation: Sequence[Conversation]) -> list[Conversation]:
    """Rows of the last stage's validation part (or training part) for the report: of as many categories as there are."""
    if not last.evaluate.samples:
        return []
    rows = list(islice(validation or conversations(last.data, last.data.train, last.seed), SAMPLED))
    rows = [row for row in rows if row.media] or rows
    by_category: dict[str, list[Conversation]] = {}
    for row in rows:
        by_category.setdefault(row.category, []).append(row)
    chosen: list[Conversation] = []
    while len(chosen) < last.evaluate.samples and any(by_category.values()):
        for group in by_category.values():
            if group and len(chosen) < last.evaluate.samples:
                # Spread over the rows, so that a panel shows different images.
                chosen.append(group.pop((7 * len(chosen)) % len(group)))
    return chosen


def _write_samples(context: _Context, model: VisionLanguageModel, rows: Sequence[Conversation], column: str) -> None:
    """Adds the model's answers to samples.json under `before` or `after`."""
    if not rows:
        return
    recipe = context.recipe.resolved_stages()[-1][1]
    path = context.run / "samples.json"
    known = {entry["id"]: entry for entry in json.loads(path.read_text())} if path.is_file() else {}
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


def out_of_memory(error: BaseException) -> TrainingError | None:
    """The advice for an out-of-memory error; None for any other."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return TrainingError(
            "out of memory; halve train.batch_size and double train.gradient_accumulation (the same gradient), "
            "or set train.gradient_checkpointing: true, or model.llm.quantize: nf4. Finished checkpoints are kept: --resume"
        )
    return None
