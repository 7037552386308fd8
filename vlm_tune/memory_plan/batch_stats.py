"""Batch sizes of a stage, from its data if that is quick to prepare, else from `max_length`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vlm_tune.config.grpo import Grpo
from vlm_tune.config.recipe import Recipe
from vlm_tune.config.tune import task_rule
from vlm_tune.data.batch import Batch
from vlm_tune.data.batching.collate import collate
from vlm_tune.data.batching.corruption import corruption_of
from vlm_tune.data.batching.loader import Place, Position, PreparedFeed
from vlm_tune.data.batching.sampler import Plan, Sizes
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.packing import completed, group_layout, prompt_of, separate_rows, trees
from vlm_tune.data.prepare.dataset import Group, Prepared
from vlm_tune.data.prepare.forms import check_forms
from vlm_tune.data.prepare.run import prepare, scratch_texts
from vlm_tune.data.types import IGNORE_INDEX, Example, InputSpec
from vlm_tune.errors import DataError, Interrupted, ModelError
from vlm_tune.model.build import build_processor
from vlm_tune.model.feature_choice import Usage, stage_usage
from vlm_tune.model.language.masks import same_sample

PREPARING = 3.0
"""Most seconds that are spent on preparing data."""

SAMPLED = 16
"""Number of batches over whose mean FLOPs are counted."""


@dataclass(frozen=True)
class Work:
    """Sizes of a micro-batch.

    `rows`, `length` and `labels` are those of the padded batch; the others count without padding.
    `attended` is the number of pairs of positions of which the first attends to the second, in one
    layer of every stack.
    """

    rows: int
    length: int
    labels: int
    tokens: float
    label_tokens: float
    supervised: float
    images: float
    attended: float


@dataclass
class Reading:
    """A stage's largest batch, the mean of several, its number of images, and an epoch's steps.

    `source` says where these are from, `usage` what all steps read together.
    """

    batch: Batch | None
    mean: Work | None
    images: int
    source: str
    steps: int | None = None
    usage: Usage | None = None


def readings(recipe: Recipe, tokens: int | None, processes: int) -> tuple[Any, list[Reading]]:
    """The tokenizer, None if it can't be loaded, and the batch statistics of each stage."""
    stages = recipe.resolved_stages()
    processor, why = _processor(recipe)
    tokenizer = processor.tokenizer if processor else None
    if tokens is not None:
        return tokenizer, [Reading(None, None, 0, f"--tokens {tokens:,}") for _ in stages]
    return tokenizer, [_read(stage, processor, why, recipe, processes) for _, stage in stages]


def _processor(recipe: Recipe) -> tuple[Processor | None, str]:
    try:
        return build_processor(recipe, scratch_texts(recipe)), ""
    except ModelError as error:
        return None, str(error).partition(":")[0]
    except DataError as error:
        return None, str(error)


def _read(
    stage: Recipe, processor: Processor | None, why: str, recipe: Recipe, processes: int
) -> Reading:
    data = stage.data
    until = time.monotonic() + PREPARING
    if processor is None or data.streaming:
        return Reading(None, None, 0, f"max_length ({why or 'rows are streamed'})")
    variant = processor.variant(
        data.template if data.template != recipe.data.template else None,
        data.system,
        data.enable_thinking,
    )
    try:
        prepared = prepare(
            data, data.train, variant, seed=stage.seed, stop=lambda: time.monotonic() > until
        )
        check_forms(stage.objective, prepared, "train")
        feed = _feed(stage, prepared, variant, processes)
    except Interrupted:
        return Reading(
            None,
            None,
            0,
            f"max_length (the rows are not prepared and take more than {PREPARING:g} s)",
        )
    except DataError as error:
        return Reading(None, None, 0, f"max_length ({error})")
    start = Position()
    largest, sampled, count = _chosen(feed)
    works = [work_of(feed.batch(start, place)) for place in sampled]
    means: list[Any] = [
        float(np.mean([getattr(work, name) for work in works]))
        for name in Work.__dataclass_fields__
    ]
    mean = Work(*means)
    source = f"the largest of {count:,} batches of the data"
    return Reading(
        feed.batch(start, largest),
        mean,
        len(prepared.media),
        source,
        feed.steps(start),
        stage_usage(prepared, stage.train, processes),
    )


def _feed(stage: Recipe, prepared: Prepared, processor: Processor, processes: int) -> PreparedFeed:
    sizes = Sizes.of(stage.train, processes)
    by_task = task_rule(stage.tune) is not None
    plan = Plan(prepared, stage.data, sizes, stage.seed, by_task=by_task)
    if isinstance(stage.objective, Grpo):
        return SampledFeed(prepared, plan, processor.spec, stage)
    corruption = corruption_of(stage.objective, processor, stage.seed)
    return PreparedFeed(prepared, plan, processor.spec, None, corruption=corruption)  # type: ignore[arg-type]


class SampledFeed(PreparedFeed):
    """Batches of prompts with as many and as long completions as an objective may sample."""

    def __init__(self, prepared: Prepared, plan: Plan, spec: InputSpec, stage: Recipe) -> None:
        super().__init__(prepared, plan, spec, None)  # type: ignore[arg-type]
        self.stage = stage

    def unit(self, number: int) -> Group:
        """The rows of a unit with completions."""
        return [
            row
            for example in self.prepared.unit(number)
            for row in with_completions(example, self.stage, self.spec.layout)
        ]


def with_completions(example: Example, stage: Recipe, layout: str) -> Group:
    """The prompts of an example with the most and longest completions of each, joined as rows."""
    objective = stage.objective
    assert isinstance(objective, Grpo)
    ids = [0] * objective.max_completion_length
    groups = [
        group_layout(
            [completed(prompt_of(row, layout), ids, layout)] * objective.num_generations, layout
        )
        for row in separate_rows(example)
    ]
    if layout == "seq2seq":
        return groups
    return [tree.row for tree in trees(groups, stage.data.row_length)]


def _chosen(feed: PreparedFeed) -> tuple[Place, list[Place], int]:
    """The first epoch's micro-batch with most padded tokens, `SAMPLED` others, and their count."""
    epoch = feed.plan.epoch(0)
    lengths = feed.plan.lengths
    places = epoch.places(feed.ranks)

    def padded(place: Place) -> int:
        rows = epoch.rows(*place, 0, feed.ranks)
        length = max(
            (lengths[row[0], 0] if len(row) == 1 else lengths[row, 1].sum() for row in rows),
            default=0,
        )
        return int(length) * sum(
            len(feed.prepared.unit(row[0])) if len(row) == 1 else 1 for row in rows
        )

    sampled = sorted({int(number) for number in np.linspace(0, len(places) - 1, SAMPLED)})
    return max(places, key=padded), [places[number] for number in sampled], len(places)


def work_of(batch: Batch) -> Work:
    """The sizes of a batch."""
    rows, length = batch.input_ids.shape
    labels = batch.labels.shape[1]
    real = batch.attention_mask
    causal = batch.labels.shape == batch.input_ids.shape
    supervised = batch.labels != IGNORE_INDEX
    inputs = real.sum(1).double()
    outputs = supervised.sum(1).double()
    if causal:
        place = torch.arange(length)
        pairs = (
            ((batch.visible_until - place) * real).sum()
            if batch.visible_until is not None
            else (inputs * (inputs + 1) / 2).sum()
        )
    elif batch.samples is not None and batch.label_samples is not None:
        samples = batch.samples
        answers = batch.label_samples.masked_fill(~supervised, -2)
        order = torch.ones(labels, labels, dtype=torch.bool).tril()
        pairs = (same_sample(samples, samples)[:, 0] & real[:, None] & real[..., None]).sum()
        pairs = pairs + (same_sample(answers, samples)[:, 0] & real[:, None]).sum()
        pairs = pairs + (same_sample(answers, answers)[:, 0] & order & supervised[..., None]).sum()
    else:
        pairs = (inputs**2 + outputs * (outputs + 1) / 2 + inputs * outputs).sum()
    answers = 0.0 if causal else float(supervised.sum())
    return Work(
        rows,
        length,
        labels,
        float(real.sum()),
        answers,
        float(supervised.sum()),
        float(len(set(batch.media_index.tolist()))),
        float(pairs),
    )


def longest_batch(stage: Recipe, spec: Any, length: int) -> Batch:
    """A batch of rows of `length` tokens with one image each, whose whole text is supervised.

    For an encoder-decoder, the labels are an answer of the longest length. Where completions are
    sampled, the rows are prompts with these.
    """
    rows = (
        stage.train.batch_size
        if stage.train.batch_tokens is None
        else max(stage.train.batch_tokens // length, 1)
    )
    shown = min(spec.tokens_per_image, length - 1)
    ids = torch.zeros(rows, length, dtype=torch.int64)
    slots = torch.zeros(rows, length, dtype=torch.bool)
    slots[:, :shown] = shown == spec.tokens_per_image
    if isinstance(stage.objective, Grpo):
        labels = np.full(length, IGNORE_INDEX)
        prompt = Example("longest", ids[0].numpy(), labels, slots[0].numpy(), ())
        batch = collate(with_completions(prompt, stage, spec.layout) * rows, spec)
        batch.media_index = torch.arange(rows if slots.any() else 0)
        return batch
    labels = torch.zeros_like(ids)
    if spec.layout == "causal":
        labels[slots] = IGNORE_INDEX
    else:
        labels = labels[:, : stage.evaluate.max_new_tokens]
    return Batch(
        ids=["longest"] * rows,
        input_ids=ids,
        attention_mask=torch.ones_like(slots),
        image_mask=slots,
        labels=labels,
        media_index=torch.arange(rows if slots.any() else 0),
    )
