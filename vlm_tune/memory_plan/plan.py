"""Predicts what a recipe needs: parameters, memory by cause and FLOPs, from configs alone.

The model is built on the meta device and tuned by the real rules. Its real forward and backward
pass is traced on fake tensors (`memory_plan.tracer`). The share of weights, gradients and optimizer
states of each process follows from ZeRO's definition.
"""

from __future__ import annotations

import math
import pickle
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from vlm_tune.config.load import as_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.batching.sampler import planned_steps
from vlm_tune.data.types import Batch
from vlm_tune.errors import Problem, RecipeError, check_count, number_problems
from vlm_tune.memory_plan.advice import changed, changes, written
from vlm_tune.memory_plan.batch_stats import Reading, Work, longest_batch, readings, work_of
from vlm_tune.memory_plan.communication import GIGABIT, Communication, communication, traffic
from vlm_tune.memory_plan.heap import allocator
from vlm_tune.memory_plan.machine import measure
from vlm_tune.memory_plan.results import Advice, Memory, Offload, PartSize, Plan, StagePlan
from vlm_tune.memory_plan.step import ROWS, traced
from vlm_tune.memory_plan.zero import Held, Shares, zero_memory
from vlm_tune.model.build import bare_model, trained_later
from vlm_tune.model.lora import parts
from vlm_tune.model.optimizer_groups import TuneRow
from vlm_tune.model.tuning import apply_rules
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.model.weights import count_of
from vlm_tune.precision import DTYPES
from vlm_tune.quoting import quoted
from vlm_tune.resources import KERNEL_BYTES, KERNELS

CONTEXT = 600_000_000
"""Bytes that the CUDA context and the libraries' work space take on a GPU."""
MOST_PROCESSES = 1_000_000
UNITS = {
    "": 1,
    "B": 1,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
LONGEST = 1_000_000
"""Most tokens of a row that `tokens` may set."""


def plan(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] | dict[str, Any] = (),
    *,
    gpu_memory: str | int | None = None,
    processes: int = 1,
    zero: int = 0,
    offload: Offload = "none",
    nodes: int = 1,
    bandwidth: float = 100.0,
    tflops: float | None = None,
    tokens: int | None = None,
    advise: bool = False,
) -> Plan:
    """Predicts what a recipe's run needs, without loading weights.

    Args:
        recipe: a recipe or its path.
        overrides: of the recipe's fields.
        gpu_memory: of each device, in bytes or as a text like 24GB.
        processes: on all nodes together.
        zero: DeepSpeed's ZeRO stage, 0 for DDP.
        offload: what DeepSpeed offloads to the host.
        nodes: number of nodes.
        bandwidth: in Gbit/s, of a node's link, or of a device's link on one node.
        tflops: speed that a device reaches, if it is known.
        tokens: length of a row, instead of the data's lengths.
        advise: whether changes that need less are planned even if the run fits.

    Returns:
        The plan. If the run does not fit, or with `advise`, its `advice` lists changes and the
        memory that each needs.

    Raises:
        RecipeError: `gpu_memory` is not a size, or settings are impossible.
        ModelError: names or rules don't fit the model.
    """
    started = time.perf_counter()
    loaded = as_recipe(recipe, overrides)
    _check_arguments(gpu_memory, processes, zero, offload, nodes, tokens)
    limit = parse_size(gpu_memory) if isinstance(gpu_memory, str) else gpu_memory
    gpu = limit is not None or torch.cuda.is_available()
    setting = _Setting(
        processes,
        zero,
        tokens,
        gpu,
        offload,
        nodes,
        bandwidth,
        tflops,
        CONTEXT if gpu else resident(),
    )
    _check(loaded, setting)
    stages = _stage_plans(loaded, *readings(loaded, tokens, processes), setting)
    planned = Plan(
        name=loaded.name,
        device="gpu" if gpu else "cpu",
        precision=loaded.train.precision,
        quantize=loaded.model.llm.quantize,
        processes=processes,
        zero=zero,
        nodes=nodes,
        offload=offload,
        gpu_memory=limit,
        allocator=None if gpu else allocator(),
        stages=stages,
        seconds=0.0,
        # A given memory size, and several processes, mean another machine than this one.
        machine=measure(loaded.train.precision, DTYPES[loaded.train.precision])
        if limit is None and processes == 1
        else None,
    )
    advice = _advice(loaded, planned, setting) if advise or planned.fits is False else []
    return replace(planned, advice=advice, seconds=round(time.perf_counter() - started, 2))


def _check_arguments(
    gpu_memory: Any, processes: Any, zero: Any, offload: Any, nodes: Any, tokens: Any
) -> None:
    """Raises `RecipeError` for an argument of another kind than `plan` takes."""
    if not isinstance(gpu_memory, str):
        check_count("--gpu-memory", gpu_memory)
    for option, count in (("--processes", processes), ("--nodes", nodes)):
        check_count(option, count)
        if count > MOST_PROCESSES:
            raise RecipeError(
                [Problem(option, f"expected at most {MOST_PROCESSES:,}, not {count:,}")]
            )
    if zero not in (0, 1, 2, 3):
        raise RecipeError([Problem("--zero", f"expected 0 to 3, not {quoted(zero)}")])
    if offload not in get_args(Offload):
        raise RecipeError(
            [Problem("--offload", f"{quoted(offload)} is none of {', '.join(get_args(Offload))}")]
        )
    check_count("--tokens", tokens)
    if tokens is not None and not 2 <= tokens <= LONGEST:
        raise RecipeError([Problem("--tokens", f"expected 2 to {LONGEST:,}, not {tokens:,}")])


def parse_size(text: str) -> int:
    """Bytes of a text like 24GB or 22.5 GiB. Raises `RecipeError` for any other text."""
    number = text.strip().rstrip("BGMTbgmti ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = int(float(number) * UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise RecipeError(
            [Problem("--gpu-memory", f"{quoted(text)} is no size as 24GB or 40GiB")]
        ) from None
    if size <= 0:
        raise RecipeError(
            [Problem("--gpu-memory", f"expected a size above 0, as 24GB, not {quoted(text)}")]
        )
    return size


@dataclass(frozen=True)
class _Setting:
    """The devices and options of a plan.

    `tokens` is a row's length if the user sets it, `base` the bytes that are taken before the run.
    `known` caches the traced stages, so that a change of processes alone needs no new trace.
    """

    processes: int
    zero: int
    tokens: int | None
    gpu: bool
    offload: Offload
    nodes: int
    bandwidth: float
    tflops: float | None
    base: int
    known: dict[Any, _Stage] = field(default_factory=dict)


def _check(recipe: Recipe, setting: _Setting) -> None:
    """Raises `RecipeError` for settings that exclude each other."""
    quantize = recipe.model.llm.quantize
    problems = []
    if setting.processes % setting.nodes:
        problems.append(
            Problem(
                "--nodes",
                f"{setting.processes} processes can't be spread evenly over {setting.nodes} nodes",
            )
        )
    if setting.offload != "none" and setting.zero < (least := 3 if setting.offload == "all" else 1):
        problems.append(
            Problem(
                "--offload",
                (
                    f"{setting.offload} needs --zero {least}{'' if least == 3 else ' or more'}, "
                    f"not {setting.zero}"
                ),
            )
        )
    if quantize and setting.zero == 3:
        problems.append(
            Problem(
                "--zero",
                f"ZeRO-3 can't divide an LLM in {quantize} (model.llm.quantize); --zero 2 can be",
            )
        )
    problems += number_problems("--bandwidth", setting.bandwidth) + number_problems(
        "--tflops", setting.tflops
    )
    if problems:
        raise RecipeError(problems)


def _stage_plans(
    recipe: Recipe, tokenizer: Any, read: Sequence[Reading], setting: _Setting
) -> list[StagePlan]:
    stages = recipe.resolved_stages()
    return [
        _stage_plan(recipe, number, stage, tokenizer, read[number], setting)
        for number, (_, stage) in enumerate(stages)
    ]


@dataclass(frozen=True)
class _Stage:
    """Sizes of a stage's model and of one step, which do not depend on the number of processes.

    `creation` is the bytes that creating random weights takes, `features` the shape of an image's
    features and `feature_bytes` their size. `still` says that the tower is frozen, `cached` that
    its features are cached. `figures` and `holes` are those of `traced`.
    """

    sizes: list[PartSize]
    weights: Held
    tuning: list[TuneRow]
    creation: int
    still: bool
    cached: bool
    features: tuple[int, int]
    feature_bytes: int
    attention: float
    peak: Work
    figures: np.ndarray
    holes: int


def _stage(
    recipe: Recipe,
    number: int,
    stage: Recipe,
    tokenizer: Any,
    largest: Batch | None,
    setting: _Setting,
) -> _Stage:
    """Builds and traces a stage's model with its `largest` batch, or the longest possible if None.

    Stages in `setting.known` are not traced again.
    """
    key = (recipe.model_dump_json(), number, pickle.dumps(largest))
    if key in setting.known:
        return setting.known[key]
    model, features = bare_model(recipe, tokenizer, attention="sdpa" if setting.gpu else None)
    creation = _weights(model) if recipe.scratch else 0
    precision = DTYPES[stage.train.precision]
    rate = stage.train.learning_rate
    with torch.device("meta"):
        tuned = apply_rules(
            model,
            stage.tune,
            learning_rate=rate,
            precision=precision,
            exact=trained_later(recipe, number),
        )
    batch = largest or longest_batch(
        stage, model.processor.spec, setting.tokens or stage.data.max_length
    )
    still = not any(parameter.requires_grad for parameter in model.tower.parameters())
    cached = (
        still and stage.train.cache_features and not stage.data.augment and not stage.data.streaming
    )
    if recipe.scratch:
        # The largest weight that is cast exists in fp32 and in its final precision at once.
        creation += max(
            (p.numel() * p.element_size() for p in model.parameters() if p.element_size() < 4),
            default=0,
        )
    sizes = _sizes(model)
    weights = _held(model)
    attention = _attention_width(model)
    item = next(model.tower.parameters()).element_size()
    figures, holes = traced(model, stage, batch, features if cached else None, gpu=setting.gpu)
    traced_stage = _Stage(
        sizes,
        weights,
        tuned.table,
        creation,
        still,
        cached,
        features,
        math.prod(features) * item,
        attention,
        work_of(batch),
        figures,
        holes,
    )
    setting.known[key] = traced_stage
    return traced_stage


def _stage_plan(
    recipe: Recipe, number: int, stage: Recipe, tokenizer: Any, reading: Reading, setting: _Setting
) -> StagePlan:
    traced_stage = _stage(recipe, number, stage, tokenizer, reading.batch, setting)
    accumulation = stage.train.gradient_accumulation
    resident_weights = traced_stage.weights
    weights = 0
    if traced_stage.cached and not setting.gpu and setting.processes == 1:
        # No step reads the tower: the run moves it out of memory once its features are cached.
        resident_weights = replace(
            resident_weights, frozen=resident_weights.frozen - traced_stage.sizes[0].bytes
        )
        weights = sum(size.bytes for size in traced_stage.sizes)
    shares = zero_memory(
        resident_weights,
        sum(size.trained for size in traced_stage.sizes),
        stage=setting.zero,
        processes=setting.processes,
        accumulating=accumulation > 1,
        # On a CPU, offloaded parts would stay in the same memory.
        offload_optimizer=setting.gpu and setting.offload != "none",
        offload_parameters=setting.gpu and setting.offload == "all",
    )
    memory = _memory(
        traced_stage.figures[:12],
        traced_stage.holes,
        shares,
        setting,
        half=stage.train.precision != "fp32",
    )
    mean = reading.mean or traced_stage.peak
    tower = (
        0.0
        if traced_stage.cached
        else mean.images
        * traced_stage.features[0]
        * (2 if traced_stage.still else 6)
        * traced_stage.sizes[0].total
    )
    products = float(sum(traced_stage.figures[12:] * [getattr(mean, name) for name in ROWS]))
    flops = accumulation * (products + tower + 12 * traced_stage.attention * mean.attended)
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
        flops=flops,
        feature_cache=reading.images * traced_stage.feature_bytes if traced_stage.cached else 0,
        cached=traced_stage.cached,
        communication=_communication(
            traced_stage.sizes, accumulation, flops, traced_stage.cached, setting
        )
        if setting.processes > 1
        else None,
        steps=_steps(stage, reading),
    )


def _steps(stage: Recipe, reading: Reading) -> int | None:
    """Optimizer steps of a stage; None if it is set in epochs and its rows are not known."""
    if stage.train.steps is not None or reading.steps is None:
        return stage.train.steps
    return planned_steps(stage.train, reading.steps)


def _communication(
    sizes: list[PartSize], accumulation: int, flops: float, cached: bool, setting: _Setting
) -> Communication:
    """Traffic and time between the processes.

    All weights run, except those of a tower whose features are cached.
    """
    tower, connector, llm = sizes
    returned = (
        llm.bytes
        + connector.bytes * (connector.trained + tower.trained > 0)
        + tower.bytes * (tower.trained > 0)
    )
    sent = traffic(
        4 * sum(size.trained for size in sizes),
        llm.bytes + connector.bytes + (0 if cached else tower.bytes),
        returned,
        stage=setting.zero,
        processes=setting.processes,
        accumulation=accumulation,
    )
    speed = setting.tflops * 1e12 if setting.tflops else None
    return communication(
        sent, flops, nodes=setting.nodes, bandwidth=setting.bandwidth * GIGABIT, speed=speed
    )


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


def _memory(
    peaks: np.ndarray, holes: int, shares: Shares, setting: _Setting, *, half: bool
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
        holes=holes,
        kernels=KERNELS * KERNEL_BYTES if half and not setting.gpu else 0,
        base=setting.base,
    )


def resident() -> int:
    """Resident bytes of this process.

    As long as no model is loaded, they are the interpreter's and the libraries'.
    """
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )


def _advice(recipe: Recipe, planned: Plan, setting: _Setting) -> list[Advice]:
    """Changes that need less than the plan, each planned in the same way, least memory first."""
    advice = []
    for text, change, quantize, at in changes(recipe, setting.processes, setting.zero):
        other = changed(recipe, change, quantize)
        where = replace(
            setting,
            zero=at,
            processes=max(setting.processes, 2) if at > setting.zero else setting.processes,
        )
        stages = _stage_plans(other, *readings(other, where.tokens, where.processes), where)
        sets = written("train", change(recipe.train))
        for number, stage in enumerate(recipe.stages):
            # A field that a stage sets itself is not changed by the common train section.
            overrides = {
                key: value
                for key, value in change(recipe.resolved_stages()[number][1].train).items()
                if key in stage.train
            }
            sets += written(f"stages.{number}.train", overrides)
        sets += [f"model.llm.quantize={quantize}"] if quantize else []
        advice.append(Advice(text, sets, at, max(stage.needed for stage in stages)))
    return sorted(
        (one for one in advice if one.needed < planned.needed), key=lambda one: one.needed
    )
