"""What a training step takes: the bytes of its fullest moments and its FLOPs, from the real pass on fake tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vlm_tune.config.recipe import Recipe
from vlm_tune.data.types import IGNORE_INDEX, Batch
from vlm_tune.memory_plan.heap import allocator, holes
from vlm_tune.memory_plan.tracer import by_depth, to_fake, trace_step
from vlm_tune.model.acceleration.decoder_layer import DecoderLayer
from vlm_tune.model.acceleration.interval_attention import attending
from vlm_tune.model.acceleration.lora_layers import LoraLinear
from vlm_tune.model.acceleration.mlp import GatedModule
from vlm_tune.model.tuning import count_of, is_linear
from vlm_tune.model.vlm import Alignment, VisionLanguageNetwork
from vlm_tune.precision import DTYPES

ROWS = ("tokens", "label_tokens", "supervised", "images")
"""What the rows of a matrix product are a multiple of, as `Work` names it."""


def traced(
    model: VisionLanguageNetwork,
    stage: Recipe,
    batch: Batch,
    features: tuple[int, int] | None,
    *,
    gpu: bool,
) -> tuple[np.ndarray, int]:
    """Bytes of the four peaks by kind (12 figures) and FLOPs for each row of ROWS (4 figures); bytes of holes, on a CPU."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    tower = model.tower
    dtype = next(tower.parameters()).dtype
    count = len(batch.media_index.unique())
    model.train()
    if stage.train.gradient_checkpointing:
        model.llm.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    with fake:
        shown: Any = None
        if count and features:
            shown = torch.empty(count, *features, dtype=dtype)
        elif count:
            shown = torch.empty(count, 3, tower.image_size, tower.image_size, dtype=torch.uint8)
    given = replace(batch, **{"features" if features else "pixels": shown})
    half = DTYPES[stage.train.precision]
    vocabulary = model.llm.model.get_input_embeddings().num_embeddings
    align = stage.objective.kind == "contrastive"
    accumulating = stage.train.gradient_accumulation > 1
    idle = [0]

    def step() -> torch.Tensor:
        found = model(given, align=align)
        return (
            found.images.sum() + found.captions.sum() if isinstance(found, Alignment) else found.sum
        )

    def measure() -> np.ndarray:
        to_fake(model, fake)
        # Around both passes, as the engines have it: what autocast keeps of weights it cast lives as long.
        with (
            _multiplied(model, batch, gpu) as products,
            torch.autocast("cpu", dtype=half, enabled=half != torch.float32),
        ):
            trace = trace_step(model, model.llm, step, vocabulary, fake)
        for parameter in model.parameters():
            parameter.grad = None
        if not gpu:
            # More layers than these three leave little more idle: what differs in size is at the step's ends.
            idle[0] = holes(trace, allocator(), accumulating=accumulating)
        return np.concatenate([*trace.peaks(accumulating=accumulating), products])

    kernel = (
        attending(model.llm.model) if not gpu and model.llm.supports_intervals else nullcontext()
    )
    with disable_input_dtype_casting(model, active=half != torch.float32), kernel:
        return by_depth(model.llm, measure), idle[0]


def _counted(module: nn.Module) -> list[nn.Module]:
    """The outermost modules that are linear layers or run theirs in one: a hook within would keep them from it."""
    if is_linear(module) or isinstance(module, DecoderLayer | GatedModule | LoraLinear):
        return [module]
    return [layer for child in module.children() for layer in _counted(child)]


def _linear(module: Any, flows: bool) -> list[tuple[Any, bool]]:
    """The linear layers in one of `_counted`, and whether a gradient of what each reads is wanted; `flows` is whether of what it reads."""
    if isinstance(module, DecoderLayer):
        found: list[tuple[Any, bool]] = []
        # What each of them reads comes out of those before, of which all that read the same x stand in one group.
        for group in (module.projections()[:3], module.projections()[3:], [module.mlp]):
            found += [pair for layer in group for pair in _linear(layer, flows)]
            flows = flows or any(
                parameter.requires_grad for layer in group for parameter in layer.parameters()
            )
        return found
    if isinstance(module, GatedModule):
        *outer, inner = (module.get_submodule(name) for name in module.layer_names)
        trains = flows or any(
            parameter.requires_grad for layer in outer for parameter in layer.parameters()
        )
        return [pair for layer in outer for pair in _linear(layer, flows)] + _linear(inner, trains)
    if not isinstance(module, LoraLinear):
        return [(module, flows)]
    name = module.name
    down: Any = module.lora_A[name]
    up: Any = module.lora_B[name]
    return [(module.base_layer, flows), (down, flows), (up, flows or down.weight.requires_grad)]


@contextmanager
def _multiplied(model: VisionLanguageNetwork, batch: Batch, gpu: bool) -> Iterator[np.ndarray]:
    """Counts FLOPs of the matrix products with weights, recomputed ones once: 2 a weight forward and for each gradient."""
    products = np.zeros(len(ROWS))
    seen = set()
    handles = []
    head: Any = model.llm.head
    rows = batch.input_ids.numel()
    said = int((batch.labels != IGNORE_INDEX).sum())
    place_of = {said: 2, batch.labels.numel(): 1, rows: 0}
    per_row = (rows, batch.labels.numel(), max(said, 1), max(len(batch.media_index), 1))

    def count(module: Any, given: tuple[torch.Tensor, ...], answer: Any) -> None:
        of_head = module is head or module is model.llm
        flows = answer.sum.requires_grad if module is model.llm else given[0].requires_grad
        if id(head if of_head else module) in seen:
            return
        seen.add(id(head if of_head else module))
        taken = said if of_head else given[0].numel() // given[0].shape[-1]
        place = 2 if of_head else place_of.get(taken, 3)
        for layer, needed in _linear(head if of_head else module, flows):
            if layer.weight is not None:
                products[place] += (
                    (2 + 2 * needed + 2 * layer.weight.requires_grad)
                    * count_of(layer.weight)
                    * taken
                    / per_row[place]
                )

    for part in (model.connector, model.llm):
        # A GPU runs no kernel of a CPU's: there a hook within each layer has the layers run one by one.
        # On a CPU the head may run by a kernel too, so the hook is at what calls it.
        found = (
            [layer for layer in part.modules() if is_linear(layer)]
            if gpu
            else [model.llm if layer is head else layer for layer in _counted(part)]
        )
        handles += [layer.register_forward_hook(count) for layer in found]
    try:
        yield products
    finally:
        for handle in handles:
            handle.remove()
