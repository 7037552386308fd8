"""The data of a stage.

Prepared or streamed training rows, validation and test rows, and the cached features of their
images.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from vlm_tune.config.grpo import Grpo
from vlm_tune.config.objectives import reads_two_views
from vlm_tune.config.recipe import Recipe
from vlm_tune.config.tune import task_rule
from vlm_tune.data.batch import Batch
from vlm_tune.data.batching.bounds import stream_bounds, unkept_bounds
from vlm_tune.data.batching.corruption import corruption_of
from vlm_tune.data.batching.grounded import GroundedFeed, check_joins, follows
from vlm_tune.data.batching.loader import Feed, PreparedFeed
from vlm_tune.data.batching.prompts import PromptFeed
from vlm_tune.data.batching.references import StoredReferences
from vlm_tune.data.batching.sampler import Plan, Sizes
from vlm_tune.data.batching.streaming import StreamFeed, usable_rows
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.images.decode import PixelCache
from vlm_tune.data.media_processor import distinct_frames
from vlm_tune.data.prepare.dataset import Prepared
from vlm_tune.data.prepare.fingerprints import fingerprint_prepared, fingerprint_streams
from vlm_tune.data.prepare.forms import check_forms
from vlm_tune.data.prepare.job import PartName
from vlm_tune.data.prepare.judgements import judgement_notes
from vlm_tune.data.prepare.run import part_conversations, prepared_parts
from vlm_tune.data.prepare.worker import BAD
from vlm_tune.data.types import Conversation
from vlm_tune.evaluation.rewards import check_rewarded
from vlm_tune.events import Features, Note, Preparing, StageReport
from vlm_tune.model.feature_cache import FeatureStore, tower_features
from vlm_tune.model.feature_choice import cache_choice, mean_patches, stage_usage, trains_tower
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.model.weights import count_of
from vlm_tune.precision import DTYPES
from vlm_tune.resources import rank_cores
from vlm_tune.train.checkpoint import Progress

SAMPLED = 500
SAMPLED_STREAM = 100
"""Rows that the report's samples are chosen from; with streaming each must be decoded for it."""

LOADERS = 8
CACHED_LOADERS = 2
"""Most loader processes of a rank by default, to decode images, and to read cached features."""

SHARED_MEMORY = 1 << 30
"""Bytes of shared memory that loader processes need; a container may have 64 MB of it."""

NOTES = 20
"""Number of left-out rows whose reason is noted; counts cover the rest."""


@dataclass
class StageData:
    """The data that one stage trains on and is scored on."""

    feed: Feed
    validation: list[Conversation]
    validation_features: FeatureStore | None
    image_cost: float = 0.0
    """Cost of an image, in tokens."""
    validation_references: StoredReferences | None = None
    """The reference model's log-probabilities of the validation rows' answers, if stored."""

    def cost(self, batch: Batch) -> float:
        """The cost of a batch's forward and backward pass, in tokens."""
        images = batch.pixels if batch.features is None else batch.features
        return batch.input_ids.numel() + self.image_cost * (0 if images is None else len(images))


@dataclass
class StageRows:
    """The rows of a stage and its processor.

    `train` is None if training rows are streamed; `validation` and `test` are rows to score;
    `parts` holds the prepared data by part; `samples` are rows for the report's answers before and
    after training.
    """

    processor: Processor
    train: Prepared | None
    validation: list[Conversation]
    test: list[Conversation]
    parts: dict[PartName, list[Prepared]]
    samples: list[Conversation]


def read_stage(
    recipe: Recipe,
    processor: Processor,
    *,
    last: bool,
    report: StageReport,
    stop: Callable[[], bool],
    quarantine: Path | None,
) -> StageRows:
    """Reads all parts of a stage, and notes the rows that are left out.

    Args:
        recipe: The stage's recipe.
        processor: Tokenizer and image processor of the stage.
        last: Whether it is the run's last stage: it alone has test rows and samples for the report.
        report: Called with every event.
        stop: Returns whether the run is asked to stop.
        quarantine: File for bad rows, where the recipe asks for one.

    Raises:
        DataError: For bad data, by the recipe's policy for bad rows.
        Interrupted: If `stop` returns True.
    """
    data = recipe.data
    corruption_of(recipe.objective, processor, recipe.seed)  # an error before weights are loaded
    names: list[PartName] = [
        *(() if data.streaming else ("train",)),
        "validation",
        *(("test",) if last else ()),
    ]
    parts: dict[PartName, list[Prepared]] = {}
    for part in names:
        parts[part] = prepared_parts(
            data,
            part,
            processor,
            recipe.seed,
            progress=lambda rows, part=part: report(Preparing(part, rows)),
            stop=stop,
            note=lambda text: report(Note(text)),
        )
        for prepared in parts[part]:
            check_forms(recipe.objective, prepared, part)
            _tell_left_out(prepared, part, report)
            if data.on_bad_row == "quarantine" and quarantine and prepared.part == part:
                _quarantine(prepared, quarantine)
    (train,) = parts.get("train") or [None]
    if train is not None and follows(train):
        check_joins(data)
    if train is not None and isinstance(recipe.objective, Grpo):
        check_rewarded(recipe.objective, train.conversations(train.places("train")))
    for line in _oddities(recipe, train):
        report(Note(line))
    validation, test = (
        part_conversations(parts.get(part, ()), part) for part in ("validation", "test")
    )
    samples = _samples(recipe, processor, train, validation) if last else []
    return StageRows(processor, train, validation, test, parts, samples)


def stage_fingerprint(recipe: Recipe, rows: StageRows) -> dict[str, Any]:
    """The fingerprints of a stage's data by part, as JSON for `fingerprint_differences`.

    No file is read for it.
    """
    parts: dict[str, Any] = {
        part: [
            source
            for each in prepared
            if each.part == part
            for source in fingerprint_prepared(each)
        ]
        for part, prepared in rows.parts.items()
    }
    return (
        parts
        if rows.train is not None
        else parts | {"train": fingerprint_streams(recipe.data.train, recipe.seed)}
    )


def _oddities(recipe: Recipe, train: Prepared | None) -> list[str]:
    """Messages about oddities of a stage's training rows; `train` is None for a stream."""
    if train is None:
        return stream_bounds(recipe)
    return [*unkept_bounds(recipe, train), *judgement_notes(recipe.objective, train)]


def _tell_left_out(prepared: Prepared, part: PartName, report: StageReport) -> None:
    """Notes the rows of a part that are left out.

    Of rows held out of train: those whose prompt is too long.
    """
    where = "" if part == "train" else f" of {part}"
    if prepared.part != part:
        places = prepared.long_prompts(part)
        if len(places):
            text = (
                f"left out{where}: {len(places):,} rows held out of train whose prompt is over "
                "data.max_length"
            )
            report(Note(text))
        return
    kinds = prepared.left_out
    for reason in prepared.reasons(NOTES):
        report(Note(f"left out{where}: {reason}"))
    if sum(kinds.values()) > NOTES:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
        report(Note(f"left out{where} in all: {counts}"))


def _quarantine(prepared: Prepared, path: Path) -> None:
    """Appends the rows that can't be used to the quarantine file, unless they are there already."""
    known = set(path.read_text("utf-8", "replace").split("\n")) if path.is_file() else set()
    names = ("source", "row", "kind", "message", "content")
    rows = [
        {"part": prepared.part, **{name: record[name] for name in names}}
        for record in prepared.records(BAD)
    ]
    lines = [
        line for line in (json.dumps(row, ensure_ascii=False) for row in rows) if line not in known
    ]
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(line + "\n" for line in lines))


def _samples(
    recipe: Recipe, processor: Processor, train: Prepared | None, validation: Sequence[Conversation]
) -> list[Conversation]:
    """Rows whose answers the report shows, from the validation part or else from train.

    They are of as many categories as possible.
    """
    most = recipe.evaluate.samples
    if not most:
        return []
    if validation:
        rows = list(validation[:SAMPLED])
    elif train is not None:
        places = train.places("train")
        rows = list(train.conversations(places[train.prompts_fit(places)][:SAMPLED]))
    else:
        rows = usable_rows(recipe.data, recipe.data.train, processor, recipe.seed, SAMPLED_STREAM)
    rows = [row for row in rows if row.media] or rows
    by_category: dict[str, list[Conversation]] = {}
    for row in rows:
        by_category.setdefault(row.category, []).append(row)
    chosen: list[Conversation] = []
    while len(chosen) < most and any(by_category.values()):
        for group in by_category.values():
            if group and len(chosen) < most:
                # Spread over the rows, so that a panel shows different images.
                chosen.append(group.pop((7 * len(chosen)) % len(group)))
    return chosen


def stage_feed(
    recipe: Recipe,
    rows: StageRows,
    features: FeatureStore | None,
    accelerator: Accelerator,
    report: StageReport,
    *,
    planned: int,
    image_cost: float,
) -> Feed:
    """The feed that the training loop takes its batches from.

    `planned` is the number of processes that the run began with; `image_cost` is an image's cost in
    tokens.
    """
    settings = recipe.train
    data = recipe.data
    train = rows.train
    processor = rows.processor
    rank = accelerator.process_index
    ranks = accelerator.num_processes
    if train is None:
        return StreamFeed(
            data,
            data.train,
            processor,
            processor.images,
            settings.batch_size,
            recipe.seed,
            rank=rank,
            ranks=ranks,
            planned=planned,
            accumulation=settings.gradient_accumulation,
            by_task=task_rule(recipe.tune) is not None,
            report=lambda error: report(Note(f"left out: {error}")),
        )
    sizes = Sizes.of(settings, planned, image_cost)
    plan = Plan(train, data, sizes, recipe.seed, by_task=task_rule(recipe.tune) is not None)
    cached = features is not None
    options: dict[str, Any] = {
        "cached": cached,
        "rank": rank,
        "ranks": ranks,
        "workers": loader_workers(settings.loader_workers, accelerator.device, cached=cached),
        "start": settings.loader_start,
        "pinned": accelerator.device.type == "cuda",
    }
    fetch = features or PixelCache(processor.images)
    if isinstance(recipe.objective, Grpo):
        return PromptFeed(train, plan, processor.spec, fetch, processor=processor, **options)
    options |= {
        "augment": data.augment,
        "mismatches": recipe.objective.mismatches,
        "two_views": reads_two_views(recipe.objective),
        "corruption": corruption_of(recipe.objective, processor, recipe.seed),
    }
    if follows(train):
        return GroundedFeed(train, plan, processor.spec, fetch, processor=processor, **options)
    return PreparedFeed(train, plan, processor.spec, fetch, **options)


def loader_workers(setting: int | str, device: torch.device, *, cached: bool) -> int:
    """The number of processes that load a rank's batches ahead, for `train.loader_workers`.

    By default a GPU has as many as there are cores for each rank of its machine, less one for the
    rank itself, up to `LOADERS`, and none where shared memory, by which they pass batches on, is
    too small. `cached` says whether features are read and no images decoded.
    """
    if isinstance(setting, int):
        return setting
    if device.type != "cuda" or _shared_memory() < SHARED_MEMORY:
        return 0
    return min(rank_cores() - 1, CACHED_LOADERS if cached else LOADERS)


def _shared_memory() -> int:
    """Bytes of the machine's shared memory; 0 where it has none."""
    try:
        return shutil.disk_usage("/dev/shm").total
    except OSError:
        return 0


def image_cost(model: VisionLanguageNetwork, prepared: Prepared | None, *, cached: bool) -> float:
    """The cost of an image in the tower, in tokens of the LLM.

    It is the ratio of multiplications with weights. 0 if the features are cached. Of images that
    keep their shape it is that of a mean one in the `prepared` rows, else of the largest.
    """
    if cached:
        return 0.0
    language = sum(count_of(parameter) for parameter in model.llm.parameters())
    patches = None if prepared is None else mean_patches(prepared)
    return (
        (patches or model.tower.measure()[0])
        * sum(parameter.numel() for parameter in model.tower.parameters())
        / language
    )


def decide_features(
    recipe: Recipe,
    model: VisionLanguageNetwork,
    rows: StageRows,
    accelerator: Accelerator,
    progress: Progress,
    report: StageReport,
) -> bool:
    """Whether a stage caches its tower's features; noted where the recipe leaves it open.

    Rank 0 decides for all: the disks of nodes differ, and a step's rows depend on the answer. So it
    is decided once, and `progress` has the answer for a resumed run, whose disk may be fuller.
    """
    setting = recipe.train.cache_features
    if model.llm.native or rows.train is None or not rows.train.media or trains_tower(model):
        return False
    if recipe.data.augment:  # only those of validation images can be
        return setting is not False and bool(rows.validation)
    if setting != "auto":
        return setting
    if progress.cached is None:
        usage = stage_usage(rows.train, recipe.train, progress.ranks)
        gpu = accelerator.device.type != "cpu"
        choice = broadcast_object_list([cache_choice(recipe, model, usage, gpu=gpu)])[0]
        report(Note(f"the tower's features are {choice}"))
        progress.cached = bool(choice.cached)
    return progress.cached


def stage_features(
    recipe: Recipe,
    model: VisionLanguageNetwork,
    media: Sequence[Any],
    validation: Sequence[Conversation],
    report: StageReport,
) -> tuple[FeatureStore | None, FeatureStore | None]:
    """Cached features of the training images and of the validation images.

    They have the precision of the steps. The first is None if images are augmented, the second if
    there are none.
    """

    def cached(media: Sequence[Any]) -> FeatureStore:
        return tower_features(
            model,
            media,
            lambda done, of: report(Features(done, of)),
            lambda text: report(Note(text)),
            autocast=DTYPES[recipe.train.precision],
        )

    frames = distinct_frames(validation, model.processor.images)
    held_out = cached(frames) if frames else None
    return None if recipe.data.augment else cached(media), held_out
