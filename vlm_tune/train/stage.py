"""One stage of a run: its rows, its training loop, and the model of its best checkpoint."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from vlm_tune.config.changes import recipe_changes
from vlm_tune.config.engine import AnyEngine, shards
from vlm_tune.config.load import load_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.batching.loader import PreparedFeed
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.images.decode import PixelCache
from vlm_tune.data.prepare.job import distinct_tasks
from vlm_tune.data.prepare.media_counts import MediaCounts
from vlm_tune.errors import Interrupted
from vlm_tune.events import (
    Features,
    Note,
    PeakMemory,
    Report,
    StageEvent,
    StageReport,
    StageStart,
    Tuning,
)
from vlm_tune.model.base_weights import recipe_choice
from vlm_tune.model.checkpoint import restore_model
from vlm_tune.model.optimizer_groups import TuneRow, tune_similarity
from vlm_tune.model.precisions import load_dtype, trained_later
from vlm_tune.model.tuning import apply_rules
from vlm_tune.model.vlm import Network, VisionLanguageNetwork
from vlm_tune.model.weights import CPU, own_memory, page_out
from vlm_tune.paths import write_whole
from vlm_tune.precision import DTYPES
from vlm_tune.resources import cache_folder
from vlm_tune.run_folder import keep_recipe, retire_result
from vlm_tune.train.accelerator import MIXED, accelerator_of
from vlm_tune.train.allocator import keep_freed_memory, return_freed_memory, trim_heap
from vlm_tune.train.checkpoint import Progress, best_checkpoint, stage_folder, step_folder, step_of
from vlm_tune.train.engines.registry import build_engine
from vlm_tune.train.gpu_memory import GpuPeak, largest_gpu_peak, reset_gpu_peak
from vlm_tune.train.precomputed import references, validation_units
from vlm_tune.train.references import check_adapters_off
from vlm_tune.train.resuming import read_json, write_data
from vlm_tune.train.stage_data import (
    StageData,
    StageRows,
    decide_features,
    image_cost,
    read_stage,
    stage_features,
    stage_feed,
)
from vlm_tune.train.trainer import StageLoop
from vlm_tune.train.watchdog import Watch


@dataclass
class Context:
    """The objects that all steps of a run use."""

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
    """Whether a resumed run continues although recipe or data have changed."""
    data: list[dict[str, Any]] = field(default_factory=list)
    """The fingerprints of the stages' data, on rank 0 only."""
    peaks: list[GpuPeak] = field(default_factory=list)
    """The peak memory of the GPUs in each stage that this process trained; empty on a CPU."""
    caches: bool = False
    """Whether the last stage that began caches its tower's features."""

    def note(self, text: str) -> None:
        """Shows the user a message."""
        self.report(Note(text))

    @property
    def holds(self) -> bool:
        """Whether this process holds the language model before an engine takes it.

        If the engine shards the model, only rank 0 does.
        """
        return self.accelerator.is_main_process or not shards(self.section)

    @property
    def device(self) -> torch.device:
        """Where the model is built: on the CPU if the engine shards it, which then places it."""
        return CPU if shards(self.section) else self.accelerator.device


def _begin_work(context: Context, loop: StageLoop) -> None:
    """Updates the folder of a resumed run, after its checkpoint was loaded.

    Writes the recipe and the data's fingerprints as they are now, and moves an old result away.
    """
    if not context.resumed:
        return
    if recipe_changes(load_recipe(context.run / "recipe.yaml"), context.recipe):
        keep_recipe(context.run, context.text)
    write_data(context.run, context.data)
    if loop.total > loop.progress.step and (note := retire_result(context.run)):
        context.note(note)


def read_rows(
    context: Context, number: int, name: str, recipe: Recipe, processor: Processor
) -> StageRows:
    """The rows of a stage, encoded with the stage's own chat template and system text."""
    data = recipe.data
    common = context.recipe.data
    return read_stage(
        recipe,
        processor.variant(
            data.template if data.template != common.template else None,
            data.system,
            data.enable_thinking,
        ),
        last=number == len(context.recipe.stages or [recipe]) - 1,
        report=lambda event: context.report(event.of_stage(number, name)),
        stop=context.stop,
        quarantine=context.run / "quarantine.jsonl"
        if context.accelerator.is_main_process
        else None,
    )


def stage_loop(
    context: Context,
    model: VisionLanguageNetwork,
    name: str,
    recipe: Recipe,
    rows: StageRows,
    progress: Progress,
    checkpoint: Path | None,
) -> StageLoop:
    """Builds the training loop of one stage.

    Applies the tuning rules to the model, computes cached features and prepares the data feed. With
    `checkpoint` the loop continues from there.
    """
    folder = stage_folder(context.run, progress.stage, name)

    def report(event: StageEvent) -> None:
        if isinstance(event, Features) and context.stop():
            raise Interrupted("stopped before the first step; continue with --resume")
        context.report(event.of_stage(progress.stage, name))

    earlier = dict(model.adapters)
    tuned = apply_rules(model, recipe.tune, **_tuning(context, recipe, progress.stage))
    tune_similarity(model, recipe.objective, tuned, recipe.train.learning_rate)
    if checkpoint is None:
        check_adapters_off(model, recipe, earlier)
    cached = decide_features(recipe, model, rows, context.accelerator, progress, report)
    context.caches = cached
    # With augmented images the tower runs in every step.
    pages_out = _place_weights(context, model, unused_tower=cached and not recipe.data.augment)
    _tuning_table(context, progress.stage, name, tuned.table)
    data = _stage_data(
        context, model, recipe, rows, progress, report, cached=cached, pages_out=pages_out
    )
    if recipe.objective.reference_model == "precomputed":
        _store_references(
            context, model, recipe, data, folder, report, resumed=checkpoint is not None
        )
    loop = StageLoop(
        model,
        recipe,
        tuned,
        data,
        build_engine(context.section, context.accelerator),
        folder=folder,
        progress=progress,
        report=report,
        recipe_text=context.text,
        stop=context.stop,
        resume_from=checkpoint,
        watch=context.watch,
    )
    context.report(_start_of(loop, rows, name))
    return loop


def _start_of(loop: StageLoop, rows: StageRows, name: str) -> StageStart:
    """The event of a stage before its first step."""
    train = rows.train
    counts = None if train is None else MediaCounts.of(train.used_media)
    return StageStart(
        steps=loop.total,
        from_step=loop.progress.step,
        questions=None if train is None else train.questions,
        images=None if counts is None else counts.images,
        frames=0 if counts is None else counts.frames,
        clips=0 if counts is None else counts.clips,
        left_out=None if train is None else train.left_out,
        streaming=train is None,
        stage=loop.progress.stage,
        name=name,
    )


def _store_references(
    context: Context,
    model: VisionLanguageNetwork,
    recipe: Recipe,
    data: StageData,
    folder: Path,
    report: StageReport,
    *,
    resumed: bool,
) -> None:
    """Adds the reference model's log-probabilities of all answers to the data of a stage."""
    assert isinstance(data.feed, PreparedFeed)
    objective = recipe.objective
    rows = data.validation[: recipe.evaluate.limit]
    scored = objective.selects_by != "answers"
    stored = references(
        model,
        recipe,
        data.feed,
        validation_units(model, rows if scored else [], mismatches=objective.mismatches),
        data.validation_features or PixelCache(model.processor.images),
        context.accelerator,
        folder,
        report,
        validation_cached=data.validation_features is not None,
        resumed=resumed,
    )
    data.feed.references = stored.train
    data.validation_references = stored.validation


def _place_weights(context: Context, model: VisionLanguageNetwork, *, unused_tower: bool) -> bool:
    """Moves parts that the engine does not place to the device, on a CPU all into own memory.

    Returns whether that waits until the tower's features are cached: a tower that no step runs
    (`unused_tower`) is paged out then, and never in memory beside the language model.
    """
    accelerator = context.accelerator
    if shards(context.section):
        for part in (model.tower, model.connector):
            part.to(accelerator.device)
    if accelerator.device.type != "cpu":
        return False
    # With several processes the engines broadcast the tower's weights.
    pages_out = accelerator.num_processes == 1 and unused_tower
    if not pages_out:
        own_memory(model)
    keep_freed_memory()
    return pages_out


def _stage_data(
    context: Context,
    model: VisionLanguageNetwork,
    recipe: Recipe,
    rows: StageRows,
    progress: Progress,
    report: StageReport,
    *,
    cached: bool,
    pages_out: bool,
) -> StageData:
    """Computes the features if they are `cached`, and makes the feed.

    With `pages_out` the tower then leaves memory, and the other parts are copied to their own.
    """
    accelerator = context.accelerator
    features, held_out = None, None
    if cached and rows.train:
        features, held_out = stage_features(
            recipe, model, rows.train.media, rows.validation, report
        )
    if pages_out:
        return_freed_memory()  # weights that stay leave no holes in what the tower's pass took
        try:
            page_out(model.tower, cache_folder("features"))
        except OSError:  # no room for the file
            own_memory(model.tower)
        own_memory(model.connector)
        own_memory(model.llm)
        keep_freed_memory()
    if accelerator.device.type == "cpu":
        trim_heap()
    cost = image_cost(model, rows.train, cached=features is not None)
    feed = stage_feed(
        recipe, rows, features, accelerator, report, planned=progress.ranks, image_cost=cost
    )
    return StageData(feed, rows.validation, held_out, cost)


def _tuning(context: Context, recipe: Recipe, stage: int) -> dict[str, Any]:
    exact = trained_later(context.recipe, stage)
    return {
        "learning_rate": recipe.train.learning_rate,
        "precision": DTYPES[recipe.train.precision],
        "exact": exact,
        # An engine's shards are on the CPU still.
        "device": context.accelerator.device,
        "tasks": distinct_tasks(recipe.data.train),
    }


def train_stage(
    context: Context,
    model: VisionLanguageNetwork,
    name: str,
    recipe: Recipe,
    rows: StageRows,
    progress: Progress,
    checkpoint: Path | None,
) -> Path | None:
    """Trains one stage.

    Returns:
        The checkpoint to continue from by `best_model`; None if the model itself is the best.
        Nothing here refers to the model any more, so its memory is free once the caller drops it.
    """
    started = time.perf_counter()
    if context.accelerator.mixed_precision != MIXED[recipe.train.precision]:
        context.accelerator = accelerator_of(recipe)
    accelerator = context.accelerator
    reset_gpu_peak(accelerator.device)
    folder = stage_folder(context.run, progress.stage, name)
    loop = stage_loop(context, model, name, recipe, rows, progress, checkpoint)
    if accelerator.is_main_process:
        _begin_work(context, loop)
    preparing = time.perf_counter() - started
    loop.run()
    progress.seconds += preparing
    if peak := largest_gpu_peak(accelerator):
        context.peaks.append(peak)
        context.report(PeakMemory(progress.stage, name, **peak))
    if accelerator.device.type == "cpu":
        # Returns the memory of the steps before the model is built again, or answers with a tower
        # that was paged out.
        return_freed_memory()
    loop.engine.release()
    best = _best(context, folder, progress)
    if best is None and loop.engine.sharded:
        # The ranks hold shards of the weights; the last checkpoint holds the whole ones.
        accelerator.wait_for_everyone()
        best = step_folder(folder, progress.step)
    return best


def restored_model(
    context: Context, checkpoint: Path, device: torch.device, model_class: type[Network]
) -> Network:
    """A run's model from one of its checkpoints, on the device; without shards on other ranks."""
    return restore_model(
        checkpoint,
        dtype=load_dtype(context.recipe),
        bare=not context.holds,
        base=recipe_choice(context.recipe),
        device=device,
        model_class=model_class,
    )


def best_model(
    context: Context,
    checkpoint: Path,
    recipe: Recipe,
    progress: Progress,
    model_class: type[Network],
) -> Network:
    """The model of a stage's best checkpoint, on the device.

    The stage's own model must have been dropped: a GPU may have no room for two. Where the engine
    will shard the model for a further stage, it is left on the CPU.
    """
    gc.collect()  # a model is part of reference cycles
    device = context.accelerator.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
    ends = progress.stage == len(context.recipe.resolved_stages()) - 1
    # The last checkpoint is read only where the ranks held shards. Other engines keep the model and
    # draw no random numbers here: the next stage must draw the same.
    last = step_of(checkpoint) == progress.step
    with torch.random.fork_rng(devices=[device] if on_gpu else [], enabled=last):
        place = device if ends else context.device
        model = restored_model(context, checkpoint, place, model_class)
        apply_rules(model, recipe.tune, **_tuning(context, recipe, progress.stage))
    return model


def end_stage(context: Context, name: str, progress: Progress) -> None:
    """Writes that a stage is done, once the model to continue with is there."""
    if context.accelerator.device.type == "cpu":
        keep_freed_memory()
    if context.accelerator.is_main_process:
        path = stage_folder(context.run, progress.stage, name) / "done.json"
        done = asdict(progress) | {"cached": context.caches}
        write_whole(path, json.dumps(done, indent=1))


def _best(context: Context, folder: Path, progress: Progress) -> Path | None:
    """The best whole checkpoint to take the weights from.

    None where there is none, or where the model in memory is the best already.
    """
    if progress.best_step is None:
        return None
    best, damaged = best_checkpoint(folder, progress)
    best = broadcast_object_list([best])[0]
    for checkpoint in damaged:
        context.note(
            f"{checkpoint.name} of {folder.name}, which scored better, is damaged and was skipped"
        )
    progress.best_step, progress.best_score = (
        (progress.step, None) if best is None else (step_of(best[0]), best[1])
    )
    if best is None or progress.best_step == progress.step:
        return None
    context.note(
        f"continuing with the best checkpoint, step {progress.best_step} ({progress.best_by} "
        f"{progress.best_score:.4f})"
    )
    return best[0]


def _tuning_table(context: Context, number: int, name: str, table: Sequence[TuneRow]) -> None:
    """Reports a stage's tuning table and writes it to tuning.json after those of earlier stages."""
    rows = [asdict(row) for row in table]
    context.report(Tuning(number, name, rows))
    if context.accelerator.is_main_process:
        path = context.run / "tuning.json"
        tables = read_json(path, list, context.note, "the tables of earlier stages are lost") or []
        tables = [*tables[:number], {"stage": name, "rows": rows}]
        write_whole(path, json.dumps(tables, indent=1))
