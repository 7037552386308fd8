"""One stage of a run: its rows, its loop, and the model as its best checkpoint leaves it."""

from __future__ import annotations

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
from vlm_tune.config.engine import AnyEngine
from vlm_tune.config.load import load_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.chat.processor import Processor
from vlm_tune.errors import Interrupted
from vlm_tune.model.base_weights import recipe_choice
from vlm_tune.model.build import load_dtype, trained_later
from vlm_tune.model.checkpoint import restore_model
from vlm_tune.model.tuning import TuneRow, apply_rules
from vlm_tune.model.vlm import Network, VisionLanguageNetwork
from vlm_tune.model.weights import own_memory, page_out
from vlm_tune.precision import DTYPES
from vlm_tune.resources import cache_folder
from vlm_tune.run_folder import keep_recipe, retire_result
from vlm_tune.train.accelerator import MIXED, accelerator_of
from vlm_tune.train.allocator import keep_freed_memory, return_freed_memory, trim_heap
from vlm_tune.train.checkpoint import Progress, best_checkpoint, stage_folder, step_folder, step_of
from vlm_tune.train.engines.base import shards
from vlm_tune.train.engines.registry import build_engine
from vlm_tune.train.resuming import read_json, write_data
from vlm_tune.train.stage_data import (
    StageRows,
    caches_features,
    image_cost,
    read_stage,
    stage_features,
    stage_feed,
)
from vlm_tune.train.trainer import Report, StageData, StageLoop
from vlm_tune.train.watchdog import Watch


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


def _begin_work(context: Context, loop: StageLoop) -> None:
    """Once a resumed run's checkpoint is loaded: keeps its recipe and data as they are now, and puts an old result aside."""
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
    """What a stage reads, with its own chat format and system text."""
    data = recipe.data
    common = context.recipe.data
    return read_stage(
        recipe,
        processor.variant(data.template if data.template != common.template else None, data.system),
        last=number == len(context.recipe.stages or [recipe]) - 1,
        report=lambda event: context.report({**event, "stage": number, "name": name}),
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
    """The loop that trains one stage, from its checkpoint where it has one."""
    accelerator = context.accelerator
    folder = stage_folder(context.run, progress.stage, name)

    def report(event: dict[str, Any]) -> None:
        if event["event"] == "features" and context.stop():
            raise Interrupted("stopped before the first step; go on with --resume")
        context.report({**event, "stage": progress.stage, "name": name})

    train = rows.train
    validation = rows.validation
    tuned = apply_rules(model, recipe.tune, **_tuning(context, recipe, progress.stage))
    for part in (model.tower, model.connector) if shards(context.section) else (model,):
        part.to(accelerator.device)
    media = train.media if train else []
    on_cpu = accelerator.device.type == "cpu"
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
    feed = stage_feed(
        recipe, rows, features, accelerator, report, planned=progress.ranks, image_cost=cost
    )
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
    sizes = (
        {"questions": train.questions, "images": len(train.media), "left_out": train.left_out}
        if train
        else {"streaming": True}
    )
    report({"event": "stage", "steps": loop.total, "from_step": progress.step, **sizes})
    return loop


def _tuning(context: Context, recipe: Recipe, stage: int) -> dict[str, Any]:
    exact = trained_later(context.recipe, stage)
    return {
        "learning_rate": recipe.train.learning_rate,
        "precision": DTYPES[recipe.train.precision],
        "exact": exact,
    }


def train_stage(
    context: Context,
    model: Network,
    name: str,
    recipe: Recipe,
    rows: StageRows,
    progress: Progress,
    checkpoint: Path | None,
) -> Network:
    """Trains one stage and returns the model with the weights of its best checkpoint."""
    started = time.perf_counter()
    if context.accelerator.mixed_precision != MIXED[recipe.train.precision]:
        context.accelerator = accelerator_of(recipe)
    accelerator = context.accelerator
    folder = stage_folder(context.run, progress.stage, name)
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
            model = restore_model(
                best,
                dtype=load_dtype(context.recipe),
                bare=not context.holds,
                base=base,
                model_class=type(model),
            )
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
        context.report(
            {
                "event": "note",
                "text": f"{checkpoint.name} of {folder.name}, which scored better, is damaged: passed over",
            }
        )
    progress.best_step, progress.best_score = (
        (progress.step, None) if found is None else (step_of(found[0]), found[1])
    )
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
