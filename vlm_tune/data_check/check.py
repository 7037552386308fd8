"""`vlm-tune check`: reads all that a run would read and reports what is wrong with which row.

No weights are loaded.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm_tune.config.data import Source
from vlm_tune.config.grpo import Grpo
from vlm_tune.config.load import as_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.config.tune import task_rule
from vlm_tune.data.batching.corruption import corruption_of
from vlm_tune.data.batching.grounded import follows, join_fault
from vlm_tune.data.batching.mixture import epoch_counts
from vlm_tune.data.batching.sampler import Plan, Sizes, planned_steps
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.prepare.dataset import Prepared
from vlm_tune.data.prepare.forms import form_fault
from vlm_tune.data.prepare.job import PartName, task_names
from vlm_tune.data.prepare.media_counts import MediaCounts
from vlm_tune.data.prepare.part_rows import PartRows
from vlm_tune.data.prepare.run import prepare
from vlm_tune.data.prepare.worker import BAD, LEFT_OUT, OK
from vlm_tune.data.sources.registry import open_source, read_all
from vlm_tune.data.types import Conversation
from vlm_tune.data_check.findings import CheckReport, Part, PartReport, SourceReport, histogram
from vlm_tune.data_check.leakage import leaks
from vlm_tune.data_check.padding import padding
from vlm_tune.data_check.rules import check_batches, check_rows, check_split, report_leaks
from vlm_tune.errors import DataError, ModelError, check_count
from vlm_tune.evaluation.registry import check_metrics
from vlm_tune.evaluation.rewards import check_rewarded, check_rewards
from vlm_tune.events import Note, Preparing, Report
from vlm_tune.model.build import bare_model, build_processor, tune_bare_model
from vlm_tune.model.feature_choice import cache_choice, stage_usage
from vlm_tune.model.pretrained.connector_weights import check_connector_file
from vlm_tune.model.pretrained.vlm_checkpoints import model_section, own_folder
from vlm_tune.model.tuning import check_fits

STREAMED = 10_000
"""Rows that are read of each source if the recipe streams."""


def check(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] | dict[str, Any] = (),
    *,
    sample: int | None = None,
    show: Report | None = None,
) -> CheckReport:
    """Reads the rows of all stages and reports on them.

    Prepared rows are cached, so a run that follows starts at once.

    Args:
        recipe: a recipe file, or a loaded recipe.
        overrides: `"a.b=c"` strings, or a mapping of dotted names to values.
        sample: read the first rows of each source only, this many.
        show: called with events of progress.

    Raises:
        RecipeError: the recipe can't be run.
        DataError: a chat format can't be used.
        ModelError: a tokenizer or the connector's weights can't be used.
    """
    check_count("--sample", sample)
    loaded = as_recipe(recipe, overrides)
    started = time.perf_counter()
    stages = loaded.resolved_stages()
    check_metrics(stages[-1][1].evaluate.metrics)
    check_rewards(stage.objective for _, stage in stages)
    if sample is None and any(stage.data.streaming for _, stage in stages):
        sample = STREAMED
    stages = [(name, _sampled(stage, sample)) for name, stage in stages]
    report = CheckReport(loaded.name, sample)
    processor = build_processor(loaded, list(_texts(stages)) if loaded.scratch else [])
    for number, (name, stage) in enumerate(stages):
        report.read += _parts(
            report, name, stage, processor, last=number == len(stages) - 1, show=show
        )
    trained = {part.prepared.folder: part.rows for part in report.read if part.name == "train"}
    choices = {} if sample is not None else _feature_choices(loaded, stages, report, processor)
    distinct: dict[Any, Part] = {}  # rows that several stages read are reported once
    for part in report.read:
        data = part.recipe.data
        distinct.setdefault(
            (part.prepared.folder, part.name, data.on_bad_row, data.max_bad_rows), part
        )
        report.parts.append(_part_report(part, choices.get(part.stage)))
        if part.name == "train":
            check_batches(report, part)
    _check_fits(report, loaded, processor.tokenizer)
    for part in distinct.values():
        check_rows(report, part)
        if part.name == "train" and sample is None:
            check_split(report, part)
    scored = [part for part in distinct.values() if part.name != "train"]
    for part, part_leaks in zip(
        scored, leaks([part.rows for part in scored], list(trained.values())), strict=True
    ):
        report_leaks(report, part, part_leaks)
    report.seconds = time.perf_counter() - started
    return report


def _sampled(stage: Recipe, sample: int | None) -> Recipe:
    """Returns the stage with at most `sample` rows of each source."""
    if sample is None:
        return stage

    def cut(sources: Sequence[Any]) -> list[Any]:
        return [
            source.model_copy(update={"limit": min(source.limit or sample, sample)})
            for source in sources
        ]

    parts = {part: cut(getattr(stage.data, part)) for part in ("train", "validation", "test")}
    return stage.model_copy(update={"data": stage.data.model_copy(update=parts)})


def _texts(stages: Sequence[tuple[str, Recipe]]) -> Iterator[Conversation]:
    """Yields the usable training conversations, for a tokenizer that is trained on them."""
    for _, stage in stages:
        for source in stage.data.train:
            try:
                rows = islice(read_all([open_source(source, seed=stage.seed)]), source.limit)
                yield from (row for row in rows if isinstance(row, Conversation))
            except DataError:  # reported when the source is prepared
                continue


# --- reading ---


def _parts(
    report: CheckReport,
    name: str,
    stage: Recipe,
    processor: Processor,
    *,
    last: bool,
    show: Report | None,
) -> Iterator[Part]:
    """Yields the parts of a stage; only the last stage has a test part."""
    data = stage.data
    variant = processor.variant(data.template, data.system, data.enable_thinking)
    names: list[PartName] = ["train", "validation", *(("test",) if last else ())]
    try:
        corruption_of(stage.objective, variant, stage.seed)
    except DataError as error:
        report.add_whole(name, "train", "form", error.message, "objective")
    for part in names:
        sources: Sequence[Source] = getattr(data, part)
        if not sources:
            continue
        prepared, ms = _prepared(report, name, part, stage, sources, variant, show)
        if prepared is None:
            continue
        for source, reader in zip(prepared.sources, prepared.readers, strict=True):
            fault = form_fault(stage.objective, reader.form, part, source.objective)
            if fault is not None:
                report.add_whole(name, part, "form", fault, reader.name)
        if part == "train" and isinstance(stage.objective, Grpo):
            try:
                check_rewarded(stage.objective, prepared.conversations(prepared.places("train")))
            except DataError as error:
                report.add_whole(name, part, error.kind, error.message, error.source)
        fault = join_fault(stage.data) if part == "train" and follows(prepared) else None
        if fault is not None:
            report.add_whole(name, part, "box", fault, "data.augment")
        parts = prepared.column("part")
        usable = prepared.column("status") == OK
        everything = np.flatnonzero((parts == 0) | ~usable)
        yield Part(
            name, part, stage, PartRows(prepared, prepared.places(part)), everything, variant, ms
        )
        for held_out in names if part == "train" else ():
            places = prepared.places(held_out)
            if held_out != "train" and len(places):
                everything = np.sort(np.concatenate([places, prepared.long_prompts(held_out)]))
                yield Part(
                    name, held_out, stage, PartRows(prepared, places), everything, variant, ms
                )


def _prepared(
    report: CheckReport,
    name: str,
    part: PartName,
    stage: Recipe,
    sources: Sequence[Source],
    processor: Processor,
    show: Report | None,
) -> tuple[Prepared | None, float | None]:
    """Prepares a part; returns its rows and the milliseconds per row.

    Sources that can't be read are reported and left out.
    """
    rows = 0
    started = time.perf_counter()

    def progress(done: int) -> None:
        nonlocal rows
        rows = done
        if show:
            show(Preparing(part, done, name=name))

    def note(text: str) -> None:
        if show:
            show(Note(text))

    def prepare_sources(some: Sequence[Source]) -> Prepared:
        return prepare(
            stage.data,
            some,
            processor,
            seed=stage.seed,
            part=part,
            lenient=True,
            progress=progress,
            note=note,
        )

    try:
        prepared = prepare_sources(sources)
    except DataError:
        readable = []
        for source in sources:
            try:
                prepare_sources([source])
                readable.append(source)
            except DataError as error:
                report.add_whole(name, part, "source", error.message, error.source)
        prepared = prepare_sources(readable) if readable else None
    return prepared, 1000 * (time.perf_counter() - started) / rows if rows else None


def _check_fits(report: CheckReport, recipe: Recipe, tokenizer: Any) -> None:
    """Checks the connector's weights file, and reports rows that the language model can't read.

    The latter where the language model's config is on this machine.
    """
    try:
        model = bare_model(recipe, tokenizer)[0]
    except ModelError:
        model = None
    if own_folder(recipe) is None:
        check_connector_file(
            None if model is None else model.connector, model_section(recipe).connector
        )
    if model is None:
        return
    language = model.llm
    for part in report.read:
        if part.name == "train":
            try:
                check_fits(language, part.prepared, part.recipe)
            except ModelError as error:
                report.add_whole(part.stage, part.name, "unfit", str(error), "model.llm")


# --- figures ---


def _steps(part: Part) -> int:
    """Returns the optimizer steps of a stage in one process."""
    stage = part.recipe
    by_task = task_rule(stage.tune) is not None
    sizes = Sizes.of(stage.train)
    plan = Plan(part.prepared, stage.data, sizes, stage.seed, by_task=by_task)
    return planned_steps(stage.train, len(plan.epoch(0)))


def _mixture(part: Part) -> dict[str, int] | None:
    """The units that an epoch draws of each source; None if it draws all of them once."""
    prepared = part.prepared
    units = np.bincount(prepared.unit_sources, minlength=len(prepared.sources)).tolist()
    counts = epoch_counts(units, prepared.sources, part.recipe.data)
    if counts == units:
        return None
    drawn: dict[str, int] = {}
    for task, count in zip(task_names(prepared.sources), counts, strict=True):
        drawn[task] = drawn.get(task, 0) + count
    return drawn


def _feature_choices(
    recipe: Recipe,
    stages: Sequence[tuple[str, Recipe]],
    report: CheckReport,
    processor: Processor,
) -> dict[str, str]:
    """The decision of each stage here to cache the tower's features or not, by the stage's name.

    Stages without images, and those whose model can't be built of what is on this machine, are left
    out.
    """
    prepared = {
        part.stage: part.prepared
        for part in report.read
        if part.name == "train" and part.prepared.media
    }
    gpu = torch.cuda.is_available()
    choices: dict[str, str] = {}
    for number, (name, stage) in enumerate(stages):
        if name not in prepared:
            continue
        try:
            model = bare_model(recipe, processor.tokenizer, gpu=gpu)[0]
            tune_bare_model(model, recipe, number)
        except ModelError:
            continue
        usage = stage_usage(prepared[name], stage.train, ranks=1)
        choices[name] = str(cache_choice(stage, model, usage, gpu=gpu))
    return choices


def _part_report(part: Part, features: str | None) -> PartReport:
    prepared = part.prepared
    train = part.recipe.train
    # Of a row whose answer is sampled the stated one is compared, and not trained.
    samples = part.name == "train" and isinstance(part.recipe.objective, Grpo)
    numbers = prepared.column("number")
    status = prepared.column("status")
    forms = [open_source(config, seed=part.recipe.seed) for config in prepared.sources]
    sources = []
    for number, reader in enumerate(forms):
        source_places = part.all_places[numbers[part.all_places] == number]
        usable = PartRows(prepared, part.rows.places[numbers[part.rows.places] == number])
        kinds = Counter(kind for kind in prepared.values("kind", source_places) if kind)
        sources.append(
            SourceReport(
                source=reader.name,
                form=reader.form,
                rows=len(source_places),
                usable=len(usable.places),
                bad=int((status[source_places] == BAD).sum()),
                left_out=int((status[source_places] == LEFT_OUT).sum()),
                **asdict(
                    MediaCounts.of(prepared.media_rows[number] for number in usable.first_rows)
                ),
                tokens=int(prepared.column("tokens")[usable.places].sum()),
                supervised=0
                if samples
                else int(prepared.column("supervised")[usable.places].sum()),
                kinds=dict(sorted(kinds.items())),
            )
        )
    lengths = prepared.column("longest")[part.all_places]
    sides = [
        max(media.info.width, media.info.height)
        for media in (prepared.media_rows[number] for number in part.rows.first_rows)
        if media.media.modality == "image"
    ]
    held_out = part.name != "train" and bool(prepared.column("part")[part.rows.places].any())
    batched = part.name == "train" and len(prepared) > 0
    sizes = Sizes.of(train)
    return PartReport(
        stage=part.stage,
        part=part.name,
        sources=sources,
        questions=None if held_out else prepared.questions,
        lengths=histogram(lengths[lengths > 0]),
        image_sides=histogram(np.array(sides, dtype=np.int64)),
        padding=padding(prepared, part.recipe, sizes) if batched else [],
        ms_per_row=None if part.ms_per_row is None else round(part.ms_per_row, 3),
        steps=_steps(part) if batched else None,
        mixture=_mixture(part) if batched else None,
        features=features if batched else None,
    )
