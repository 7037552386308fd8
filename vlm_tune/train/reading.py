"""What a stage reads: its prepared or streamed rows, its validation rows, and the features of their images."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from vlm_tune.config import Recipe
from vlm_tune.data.feed import Feed, PreparedFeed
from vlm_tune.data.images import PixelCache
from vlm_tune.data.plan import Plan, Sizes
from vlm_tune.data.prepare import prepare, read_part
from vlm_tune.data.prepared import Prepared
from vlm_tune.data.processor import Processor
from vlm_tune.data.shards import BAD
from vlm_tune.data.stream import StreamFeed
from vlm_tune.data.types import Conversation, distinct_media
from vlm_tune.model.features import FeatureStore, tower_features
from vlm_tune.model.tuning import count_of
from vlm_tune.model.vlm import VisionLanguageModel
from vlm_tune.train.loop import Report

NOTES = 20
"""Rows of which a note says why they are left out; the counts say the rest."""


@dataclass
class StageRows:
    """What a stage reads: prepared training rows (None if they are streamed), validation rows, and its processor."""

    processor: Processor
    train: Prepared | None
    validation: list[Conversation]


def read_stage(recipe: Recipe, processor: Processor, *, report: Report, stop: Callable[[], bool], quarantine: Path | None) -> StageRows:
    """A stage's rows, with notes on those that are left out; bad ones are written to the file `quarantine` if asked.

    Raises `DataError` as the policy for bad rows tells, `Interrupted` when `stop` says so.
    """
    data = recipe.data
    train = None
    if not data.streaming:
        train = prepare(
            data,
            data.train,
            processor,
            seed=recipe.seed,
            progress=lambda rows: report({"event": "preparing", "rows": rows}),
            stop=stop,
        )
        _tell_left_out(train, report)
        if data.on_bad_row == "quarantine" and quarantine:
            _quarantine(train, quarantine)
    return StageRows(processor, train, read_part(data, "validation", processor, recipe.seed, train))


def _tell_left_out(train: Prepared, report: Report) -> None:
    kinds = train.left_out
    for reason in train.reasons(NOTES):
        report({"event": "note", "text": f"left out: {reason}"})
    if sum(kinds.values()) > NOTES:
        report({"event": "note", "text": f"left out in all: {', '.join(f'{count:,} {kind}' for kind, count in kinds.items())}"})


def _quarantine(train: Prepared, path: Path) -> None:
    """Adds the rows that can't be used, those that are not there yet."""
    known = set(path.read_text().splitlines()) if path.is_file() else set()
    rows = [{name: record[name] for name in ("source", "row", "kind", "message", "content")} for record in train.records(BAD)]
    lines = [line for line in (json.dumps(row, ensure_ascii=False) for row in rows) if line not in known]
    with path.open("a") as file:
        file.write("".join(line + "\n" for line in lines))


def stage_feed(
    recipe: Recipe,
    rows: StageRows,
    features: FeatureStore | None,
    accelerator: Accelerator,
    report: Report,
    *,
    planned: int,
    image_cost: float,
) -> Feed:
    """What the stage's loop takes its batches from; `planned` are the processes that the run began with."""
    settings, data = recipe.train, recipe.data
    train, processor = rows.train, rows.processor
    rank, ranks = accelerator.process_index, accelerator.num_processes
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
            report=lambda error: report({"event": "note", "text": f"left out: {error}"}),
        )
    plan = Plan(train, data, Sizes(settings.batch_size, settings.batch_tokens, planned, image_cost), recipe.seed)
    return PreparedFeed(
        train,
        plan,
        processor.spec,
        features or PixelCache(processor.images),
        cached=features is not None,
        augment=data.augment,
        rank=rank,
        ranks=ranks,
        workers=settings.loader_workers,
    )


def image_cost(model: VisionLanguageModel, *, cached: bool) -> float:
    """How many tokens of the LLM an image costs in the tower, by the weights that each is multiplied with."""
    if cached:
        return 0.0
    language = sum(count_of(parameter) for parameter in model.llm.parameters())
    return model.tower.measure()[0] * sum(parameter.numel() for parameter in model.tower.parameters()) / language


def stage_features(
    recipe: Recipe, model: VisionLanguageModel, media: Sequence[Any], validation: Sequence[Conversation], report: Report
) -> tuple[FeatureStore | None, FeatureStore | None]:
    """Cached features of the training and validation images, where the tower is frozen and images are not augmented."""
    frozen = not any(parameter.requires_grad for parameter in model.tower.parameters())
    if not recipe.train.cache_features or not frozen or not media:
        return None, None
    seen = distinct_media(validation)

    def progress(done: int, of: int) -> None:
        report({"event": "features", "done": done, "of": of})

    held_out = tower_features(model, seen, progress) if seen else None
    return None if recipe.data.augment else tower_features(model, media, progress), held_out
