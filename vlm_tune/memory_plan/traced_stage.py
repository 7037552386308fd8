"""Builds a stage's model on the meta device and measures it and one traced step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from vlm_tune.config.recipe import Recipe
from vlm_tune.data.batch import Batch
from vlm_tune.memory_plan.batch_stats import Work, longest_batch, work_of
from vlm_tune.memory_plan.results import PartSize
from vlm_tune.memory_plan.step import traced
from vlm_tune.memory_plan.zero import Held
from vlm_tune.model.build import bare_model, tune_bare_model
from vlm_tune.model.feature_choice import Usage, cache_choice, trains_tower
from vlm_tune.model.lora import parts
from vlm_tune.model.optimizer_groups import TuneRow
from vlm_tune.model.tower_pass import stored_dtype
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.model.weights import count_of
from vlm_tune.precision import DTYPES


@dataclass(frozen=True)
class TracedStage:
    """Sizes of a stage's model and of one step, which do not depend on the number of processes.

    `creation` is the bytes that creating random weights takes, `features` the shape of a mean
    image's features and `feature_bytes` their size. `still` says that the tower is frozen, `cached`
    that its features are cached and `why` the reason. `figures` and `holes` are those of `traced`.
    """

    sizes: list[PartSize]
    weights: Held
    tuning: list[TuneRow]
    creation: int
    still: bool
    cached: bool
    why: str
    features: tuple[int, int]
    feature_bytes: int
    attention: float
    peak: Work
    figures: np.ndarray
    holes: int


def trace_stage(
    recipe: Recipe,
    number: int,
    stage: Recipe,
    tokenizer: Any,
    largest: Batch | None,
    usage: Usage | None,
    *,
    gpu: bool,
    tokens: int | None,
) -> TracedStage:
    """Builds and traces a stage's model.

    It runs with the stage's `largest` batch, or with the longest possible if that is None. `usage`
    is what the steps read, None if the rows are not known.
    """
    model, features = bare_model(recipe, tokenizer, gpu=gpu)
    creation = _weights(model) if recipe.scratch else 0
    precision = DTYPES[stage.train.precision]
    tuned = tune_bare_model(model, recipe, number)
    batch = largest or longest_batch(stage, model.processor.spec, tokens or stage.data.max_length)
    peak = work_of(batch)
    choice = cache_choice(stage, model, usage or _each_row_once(stage, peak), gpu=gpu)
    if recipe.scratch:
        # The largest weight that is cast exists in fp32 and in its final precision at once.
        creation += max(
            (p.numel() * p.element_size() for p in model.parameters() if p.element_size() < 4),
            default=0,
        )
    sizes = _sizes(model)
    weights = _held(model)
    attention = _attention_width(model)
    item = stored_dtype(model.tower, precision).itemsize
    figures, holes = traced(model, stage, batch, features if choice.cached else None, gpu=gpu)
    if usage is not None and usage.patches is not None:
        features = (round(usage.patches), features[1])
    return TracedStage(
        sizes,
        weights,
        tuned.table,
        creation,
        not trains_tower(model),
        choice.cached,
        choice.reason,
        features,
        math.prod(features) * item,
        attention,
        peak,
        figures,
        holes,
    )


def _each_row_once(stage: Recipe, batch: Work) -> Usage:
    """The usage of one image and its tokens, if an epoch shows every image once."""
    epochs = stage.train.epochs or 1.0
    return Usage(1, epochs, epochs * batch.tokens / max(batch.images, 1.0))


def _sizes(model: VisionLanguageNetwork) -> list[PartSize]:
    return [_part_size(part, module) for part, module in parts(model).items()]


def _part_size(part: str, module: nn.Module) -> PartSize:
    named = list(module.named_parameters())
    return PartSize(
        part,
        total=sum(count_of(parameter) for _, parameter in named),
        trained=sum(parameter.numel() for _, parameter in named if parameter.requires_grad),
        adapters=sum(parameter.numel() for name, parameter in named if "lora_" in name),
        bytes=_weights(module),
    )


def _weights(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(
        tensor.numel() * tensor.element_size()
        for tensor in (*module.parameters(), *module.buffers())
    )


def _held(model: VisionLanguageNetwork) -> Held:
    """Bytes of frozen weights, trained weights and adapters, and of the largest single module."""
    named = [
        (name, p.requires_grad, p.numel() * p.element_size())
        for m in parts(model).values()
        for name, p in m.named_parameters()
    ]
    adapters = sum(size for name, _, size in named if "lora_" in name)
    trained = sum(size for name, train, size in named if train and "lora_" not in name)
    largest = max(
        sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
        for module in model.modules()
    )
    return Held(
        sum(map(_weights, parts(model).values())) - trained - adapters, trained, adapters, largest
    )


def _attention_width(model: VisionLanguageNetwork) -> float:
    """Layers x heads x head width of the LLM, as in 12 L h d_h A.

    Of each stack, for an encoder-decoder.
    """
    config = model.llm.model.config.get_text_config()
    head = (
        getattr(config, "head_dim", None)
        or getattr(config, "d_kv", None)
        or config.hidden_size // config.num_attention_heads
    )
    return float(config.num_hidden_layers * config.num_attention_heads * head)
