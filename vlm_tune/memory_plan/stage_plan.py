"""The plan of each stage: memory of one process and FLOPs of a step."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vlm_tune.config.recipe import Recipe
from vlm_tune.data.batching.sampler import planned_steps
from vlm_tune.memory_plan.batch_stats import Reading, Work
from vlm_tune.memory_plan.cuda import COLLECTIVES, workspaces
from vlm_tune.memory_plan.results import Memory, StagePlan
from vlm_tune.memory_plan.setting import Setting
from vlm_tune.memory_plan.step import ROWS
from vlm_tune.memory_plan.traced_stage import TracedStage, trace_stage
from vlm_tune.memory_plan.zero import Held, Shares, zero_memory
from vlm_tune.resources import KERNEL_BYTES, KERNELS, kernel_setting


def stage_plans(
    recipe: Recipe, tokenizer: Any, read: Sequence[Reading], setting: Setting
) -> list[StagePlan]:
    """The plans of a recipe's stages; `read` holds the batch statistics of each."""
    stages = recipe.resolved_stages()
    return [
        _stage_plan(recipe, number, stage, tokenizer, read[number], setting)
        for number, (_, stage) in enumerate(stages)
    ]


def _stage_plan(
    recipe: Recipe, number: int, stage: Recipe, tokenizer: Any, reading: Reading, setting: Setting
) -> StagePlan:
    traced_stage = _traced_stage(recipe, number, stage, tokenizer, reading, setting)
    resident_weights = traced_stage.weights
    weights = 0
    if traced_stage.cached and not setting.gpu and setting.processes == 1:
        # No step reads the tower: the run moves it out of memory once its features are cached.
        resident_weights = replace(
            resident_weights, frozen=resident_weights.frozen - traced_stage.sizes[0].bytes
        )
        weights = sum(size.bytes for size in traced_stage.sizes)
    shares = _shares(traced_stage, resident_weights, stage, setting)
    memory = _memory(
        traced_stage.figures[:12],
        traced_stage.holes,
        shares,
        setting,
        half=stage.train.precision != "fp32",
    )
    mean = reading.mean or traced_stage.peak
    known = reading.batch is not None or setting.tokens
    return StagePlan(
        name=recipe.resolved_stages()[number][0],
        parts=traced_stage.sizes,
        tuning=traced_stage.tuning,
        peak=traced_stage.peak,
        mean=mean,
        source=reading.source
        if known
        else f"{reading.source}: {traced_stage.peak.length:,} tokens a row",
        memory=memory,
        host=shares.host,
        loading=max(traced_stage.creation, weights) + memory.base,
        flops=stage.train.gradient_accumulation * _flops(traced_stage, mean),
        feature_cache=reading.images * traced_stage.feature_bytes if traced_stage.cached else 0,
        cached=traced_stage.cached,
        why_cached=traced_stage.why,
        steps=_steps(stage, reading),
    )


def _traced_stage(
    recipe: Recipe,
    number: int,
    stage: Recipe,
    tokenizer: Any,
    reading: Reading,
    setting: Setting,
) -> TracedStage:
    """Traces a stage as `trace_stage`; one that is in `setting.known` is not traced again."""
    key = (recipe.model_dump_json(), number, pickle.dumps((reading.batch, reading.usage)))
    if key not in setting.known:
        with kernel_setting(stage.train.kernels):
            setting.known[key] = trace_stage(
                recipe,
                number,
                stage,
                tokenizer,
                reading.batch,
                reading.usage,
                gpu=setting.gpu,
                tokens=setting.tokens,
            )
    return setting.known[key]


def _shares(
    traced_stage: TracedStage, resident_weights: Held, stage: Recipe, setting: Setting
) -> Shares:
    """The share of one process of what the stage's weights need, on its device and the host."""
    return zero_memory(
        resident_weights,
        sum(size.trained for size in traced_stage.sizes),
        stage=setting.zero,
        processes=setting.processes,
        accumulating=stage.train.gradient_accumulation > 1,
        # On a CPU, offloaded parts would stay in the same memory.
        offload_optimizer=setting.gpu and setting.offload != "none",
        offload_parameters=setting.gpu and setting.offload == "all",
    )


def _flops(traced_stage: TracedStage, mean: Work) -> float:
    """FLOPs of the forward and backward pass of a micro-batch of `mean` sizes."""
    tower = (
        0.0
        if traced_stage.cached
        else mean.images
        * traced_stage.features[0]
        * (2 if traced_stage.still else 6)
        * traced_stage.sizes[0].total
    )
    products = float(sum(traced_stage.figures[12:] * [getattr(mean, name) for name in ROWS]))
    return products + tower + 12 * traced_stage.attention * mean.attended


def _steps(stage: Recipe, reading: Reading) -> int | None:
    """Optimizer steps of a stage; None if it is set in epochs and its rows are not known."""
    if stage.train.steps is not None or reading.steps is None:
        return stage.train.steps
    return planned_steps(stage.train, reading.steps)


def _memory(
    peaks: np.ndarray, holes: int, shares: Shares, setting: Setting, *, half: bool
) -> Memory:
    """Memory of one process at its peak.

    `half` says that the run is in 16 bit: only then a CPU uses oneDNN's compiled kernels.
    """
    # The optimizer's step comes after the backward pass: all gradients exist then, and no
    # activations.
    moments = [
        (a, o, g / setting.processes if setting.zero >= 2 else g)
        for a, o, g in peaks.reshape(-1, 3)
    ]
    activations, logits, gradients = max([*moments, (0, 0, shares.gradients)], key=sum)
    return Memory(
        frozen=shares.frozen,
        trained=shares.trained,
        adapters=shares.adapters,
        optimizer=shares.optimizer,
        gradients=math.ceil(gradients),
        activations=int(activations),
        logits=int(logits),
        exchange=shares.exchange,
        collectives=COLLECTIVES if setting.gpu and setting.processes > 1 else 0,
        holes=holes,
        workspaces=workspaces() if setting.gpu else 0,
        kernels=KERNELS * KERNEL_BYTES if half and not setting.gpu else 0,
        base=setting.base,
    )
