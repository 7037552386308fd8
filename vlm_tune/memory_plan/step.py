"""Memory peaks and FLOPs of a training step, from the real forward and backward on fake tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vlm_tune.config.objectives import parts_of, reads_two_views
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.batch import Batch
from vlm_tune.data.types import IGNORE_INDEX
from vlm_tune.memory_plan.cuda import cuda_autocast, recomputed
from vlm_tune.memory_plan.heap import allocator, holes
from vlm_tune.memory_plan.tracer import by_depth, to_fake, trace_step
from vlm_tune.model.acceleration.decoder_layers import DecoderLayer
from vlm_tune.model.acceleration.gated_modules import GatedModule
from vlm_tune.model.acceleration.install import uninstall
from vlm_tune.model.acceleration.lora_layers import LoraLinear
from vlm_tune.model.language.base import AnswerLogprobs
from vlm_tune.model.lora_rules import is_linear
from vlm_tune.model.tower_pass import stored_dtype
from vlm_tune.model.vlm import Alignment, VisionLanguageNetwork
from vlm_tune.model.weights import count_of
from vlm_tune.precision import DTYPES

ROWS = ("tokens", "label_tokens", "supervised", "images")
"""The fields of `Work` that the rows of a matrix product are proportional to."""


def traced(
    model: VisionLanguageNetwork,
    stage: Recipe,
    batch: Batch,
    features: tuple[int, int] | None,
    *,
    gpu: bool,
) -> tuple[np.ndarray, int]:
    """Traces one training step of a stage.

    Returns:
        An array of 16 figures: bytes of the four peaks by kind (12), and FLOPs per row of each of
        `ROWS` (4). And bytes of holes.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model.train()
    if gpu:
        uninstall(model.llm)
    for module in model.llm.model.modules():
        if isinstance(module, DecoderLayer):
            module.only_traced = True
    if stage.train.gradient_checkpointing:
        model.llm.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
            | ({"context_fn": recomputed} if gpu else {})
        )
    half = DTYPES[stage.train.precision]
    two_views = reads_two_views(stage.objective)
    model_batch = _with_images(batch, model.tower, features, half, fake, two_views=two_views)
    vocabulary = model.llm.vocabulary
    accumulating = stage.train.gradient_accumulation > 1
    idle = [0]

    def step() -> torch.Tensor:
        return _loss(model, stage, model_batch)

    def measure() -> np.ndarray:
        to_fake(model, fake)
        # autocast is around both passes, as in the engines: its cache of cast weights lives as
        # long.
        with (
            _multiplied(model, batch, gpu) as products,
            cuda_autocast(half)
            if gpu
            else torch.autocast("cpu", dtype=half, enabled=half != torch.float32),
        ):
            trace = trace_step(model, model.llm, step, vocabulary, fake)
        for parameter in model.parameters():
            parameter.grad = None
        # More than three layers leave little more idle: other sizes are at the step's ends.
        idle[0] = holes(trace, "cuda" if gpu else allocator(), accumulating=accumulating)
        return np.concatenate([*trace.peaks(accumulating=accumulating), products])

    with disable_input_dtype_casting(model, active=half != torch.float32):
        return by_depth(model.llm, measure), idle[0]


def _loss(model: VisionLanguageNetwork, stage: Recipe, batch: Batch) -> torch.Tensor:
    """A scalar whose backward pass is that of the stage's objective; a reference pass before."""
    by_answer = batch.answers is not None
    if stage.objective.reference_model in ("adapter_off", "copy"):
        with torch.no_grad():
            model(batch, by_answer=by_answer)
    kinds = [part.kind for part in parts_of(stage.objective)]
    aligns = [kind == "contrastive" for kind in kinds if batch.objective in (None, kind)]
    losses = [_summed(model(batch, align=align, by_answer=by_answer)) for align in aligns]
    return torch.stack(losses).sum()


def _summed(output: Any) -> torch.Tensor:
    """The scalar that a forward pass ends in."""
    match output:
        case Alignment():
            views = 0 if output.views is None else output.views.sum()
            return output.images.sum() + output.captions.sum() + views
        case AnswerLogprobs():
            return output.sums.sum()
    return output.sum


def _with_images(
    batch: Batch,
    tower: Any,
    features: tuple[int, int] | None,
    half: torch.dtype,
    fake: FakeTensorMode,
    *,
    two_views: bool,
) -> Batch:
    """The batch with fake tensors for its images: pixels, or the features of this shape.

    `half` is the dtype of autocast.
    """
    count = len(batch.media_index.unique())
    shape = features or tower.input_shape
    if batch.patch_places is not None:
        shape = (batch.patch_places.shape[1], shape[1])
    with fake:
        shown: Any = None
        if count and features:
            shown = torch.empty(count, *shape, dtype=stored_dtype(tower, half))
        elif count:
            shown = torch.empty(count, *shape, dtype=tower.input_dtype)
    views = shown if two_views else None
    return replace(batch, **{"features" if features else "pixels": shown, "views": views})


def _counted(module: nn.Module) -> list[nn.Module]:
    """The outermost modules that are linear layers, or run their linear layers as one kernel.

    A hook on a layer inside would stop them from using the kernel.
    """
    if is_linear(module) or isinstance(module, DecoderLayer | GatedModule | LoraLinear):
        return [module]
    return [layer for child in module.children() for layer in _counted(child)]


def _linear(module: Any, flows: bool) -> list[tuple[Any, bool]]:
    """The linear layers in a module of `_counted`, each with whether its input needs a gradient.

    `flows` says whether the input of the module needs one.
    """
    if isinstance(module, DecoderLayer):
        layers: list[tuple[Any, bool]] = []
        # The layers of a group read the same input, which depends on the groups before.
        for group in (module.projections()[:3], module.projections()[3:], [module.mlp]):
            layers += [pair for layer in group for pair in _linear(layer, flows)]
            flows = flows or any(
                parameter.requires_grad for layer in group for parameter in layer.parameters()
            )
        return layers
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
    """Counts FLOPs of the matrix products with weights, recomputed ones once.

    They are 2 per weight and row in the forward pass, and 2 for each gradient.
    """
    products = np.zeros(len(ROWS))
    counted = set()
    handles = []
    head: Any = model.llm.head
    rows = batch.input_ids.numel()
    supervised = int((batch.labels != IGNORE_INDEX).sum())
    place_of = {supervised: 2, batch.labels.numel(): 1, rows: 0}
    per_row = (rows, batch.labels.numel(), max(supervised, 1), max(len(batch.media_index), 1))

    def count(module: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        of_head = module is head or module is model.llm
        # Without gradients it is a reference model's pass.
        if not torch.is_grad_enabled() or id(head if of_head else module) in counted:
            return
        counted.add(id(head if of_head else module))
        if module is model.llm:
            loss = output.sums if isinstance(output, AnswerLogprobs) else output.sum
            flows = loss.requires_grad
        else:
            flows = inputs[0].requires_grad
        taken = supervised if of_head else inputs[0].numel() // inputs[0].shape[-1]
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
        # On a GPU, which has no CPU kernels, a hook on each linear layer makes the layers run one
        # by one. On a CPU the head may run in a kernel too, so the hook is on the LLM, which calls
        # it.
        layers = (
            [layer for layer in part.modules() if is_linear(layer)]
            if gpu
            else [model.llm if layer is head else layer for layer in _counted(part)]
        )
        handles += [layer.register_forward_hook(count) for layer in layers]
    try:
        yield products
    finally:
        for handle in handles:
            handle.remove()
