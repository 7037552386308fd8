"""What a recipe needs before it runs: parameters, memory by cause and FLOPs, from configs and fake tensors alone.

The model is made on the meta device and tuned by the real rules; its real forward and backward pass is traced on fake
tensors (`model.tracing`). What each process holds of weights, gradients and optimizer follows from ZeRO's definition.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vlm_tune.config import Recipe, TrainSection
from vlm_tune.data.types import IGNORE_INDEX, Batch
from vlm_tune.errors import Problem, RecipeError
from vlm_tune.model.build import DTYPES, bare_model, trained_later
from vlm_tune.model.tracing import by_depth, to_fake, trace_step
from vlm_tune.model.tuning import TuneRow, apply_rules, count_of, is_linear, parts
from vlm_tune.model.vlm import Alignment, VisionLanguageModel
from vlm_tune.planning.batches import Reading, Work, longest_batch, readings, work_of
from vlm_tune.recipe import load_recipe

CONTEXT = 600_000_000
"""Bytes that CUDA's context and the libraries' work space take of a GPU."""

BUCKET = 500_000_000 * 4
"""Bytes of fp32 gradients that DeepSpeed exchanges at once, unless told otherwise."""

Change = Callable[[TrainSection], dict[str, Any]]
"""What of a train section is set to what."""

UNITS = {"": 1, "B": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class PartSize:
    """Numbers of parameters of one part, LoRA's among them, and the bytes that its weights take."""

    part: str
    total: int
    trained: int
    adapters: int
    bytes: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at its peak, by cause.

    `exchange` is what joins the processes: gradient buckets, under ZeRO-3 also the layers that are gathered.
    """

    frozen: int
    trained: int
    adapters: int
    optimizer: int
    gradients: int
    activations: int
    logits: int
    exchange: int
    base: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class StagePlan:
    """One stage: sizes, memory, and FLOPs of an optimizer step of one process.

    `loading` is the peak before the first step, where weights are made in fp32; `source` says where lengths are from.
    """

    name: str
    parts: list[PartSize]
    tuning: list[TuneRow]
    peak: Work
    mean: Work
    source: str
    memory: Memory
    loading: int
    flops: float
    feature_cache: int
    cached: bool

    @property
    def needed(self) -> int:
        """Bytes at the stage's peak."""
        return max(self.memory.total, self.loading)


@dataclass(frozen=True)
class Advice:
    """A change that lessens memory, as overrides of the recipe or a ZeRO stage, and what the run then needs."""

    text: str
    changes: list[str]
    zero: int
    needed: int


@dataclass(frozen=True)
class Plan:
    """What a run needs on each of `processes` devices; `fits` is None where no memory was named."""

    name: str
    device: str
    precision: str
    quantize: str | None
    processes: int
    zero: int
    gpu_memory: int | None
    stages: list[StagePlan]
    seconds: float
    advice: list[Advice] = field(default_factory=list)

    @property
    def needed(self) -> int:
        """Bytes at the peak of the stage that needs most."""
        return max(stage.needed for stage in self.stages)

    @property
    def fits(self) -> bool | None:
        """Whether that is within the memory named."""
        return None if self.gpu_memory is None else self.needed <= self.gpu_memory

    def summary(self) -> dict[str, Any]:
        """The plan as JSON."""
        stages = [asdict(stage) | {"needed": stage.needed} for stage in self.stages]
        return asdict(self) | {"needed": self.needed, "fits": self.fits, "stages": stages}


def plan(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] | dict[str, Any] = (),
    *,
    gpu_memory: str | int | None = None,
    processes: int = 1,
    zero: int = 0,
    tokens: int | None = None,
    advise: bool = False,
) -> Plan:
    """What a recipe's run needs, without its weights; `gpu_memory` is bytes or a text as 24GB, `tokens` a row's length.

    Where it does not fit, or with `advise`, `advice` holds changes with the figure each gives. Raises `RecipeError` for a memory that is
    no size, `ModelError` for names and rules that don't fit.
    """
    started = time.perf_counter()
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    limit = parse_size(gpu_memory) if isinstance(gpu_memory, str) else gpu_memory
    gpu = limit is not None or torch.cuda.is_available()
    setting = _Setting(processes, zero, tokens, gpu, CONTEXT if gpu else resident())
    stages = _stage_plans(loaded, *readings(loaded, tokens, processes), setting)
    found = Plan(
        name=loaded.name,
        device="gpu" if gpu else "cpu",
        precision=loaded.train.precision,
        quantize=loaded.model.llm.quantize,
        processes=processes,
        zero=zero,
        gpu_memory=limit,
        stages=stages,
        seconds=0.0,
    )
    advice = _advice(loaded, found, setting) if advise or found.fits is False else []
    return replace(found, advice=advice, seconds=round(time.perf_counter() - started, 2))


def parse_size(text: str) -> int:
    """Bytes of a text as 24GB or 22.5 GiB. Raises `RecipeError` for any other."""
    number = text.strip().rstrip("BGMTbgmti ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        return int(float(number) * UNITS[unit])
    except (ValueError, KeyError):
        raise RecipeError([Problem("--gpu-memory", f"{text!r} is no size as 24GB or 40GiB")]) from None


# --- a stage ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Setting:
    """Where a run is to happen; `tokens` is a row's length where the user says it, `base` bytes that are taken before."""

    processes: int
    zero: int
    tokens: int | None
    gpu: bool
    base: int


def _stage_plans(recipe: Recipe, tokenizer: Any, read: Sequence[Reading], setting: _Setting) -> list[StagePlan]:
    stages = recipe.resolved_stages()
    return [_stage_plan(recipe, number, stage, tokenizer, read[number], setting) for number, (_, stage) in enumerate(stages)]


def _stage_plan(recipe: Recipe, number: int, stage: Recipe, tokenizer: Any, reading: Reading, setting: _Setting) -> StagePlan:
    model, (tokens, width) = bare_model(recipe, tokenizer, attention="sdpa" if setting.gpu else None)
    made = _weights(model) if recipe.model.llm.scratch else 0
    precision = DTYPES[stage.train.precision]
    rate = stage.train.learning_rate
    tuned = apply_rules(model, stage.tune, learning_rate=rate, precision=precision, exact=trained_later(recipe, number))
    batch = reading.batch or longest_batch(stage, model.processor.spec, setting.tokens or stage.data.max_length)
    still = not any(parameter.requires_grad for parameter in model.tower.parameters())
    cached = still and stage.train.cache_features and not stage.data.augment and not stage.data.streaming
    sizes, held, largest = _sizes(model), _held(model), _largest_layer(model)
    item = next(model.tower.parameters()).element_size()
    peak, attention = work_of(batch), _attention_width(model)
    figures = _traced(model, stage, batch, (tokens, width) if cached else None)
    memory = _memory(figures[:9], held, sum(size.trained for size in sizes), largest, setting)
    mean = reading.mean or peak
    accumulation = stage.train.gradient_accumulation
    tower = 0.0 if cached else mean.images * tokens * (2 if still else 6) * sizes[0].total
    products = float(sum(figures[9:] * [getattr(mean, name) for name in ROWS]))
    flops = accumulation * (products + tower + 12 * attention * mean.attended)
    return StagePlan(
        name=recipe.resolved_stages()[number][0],
        parts=sizes,
        tuning=tuned.table,
        peak=peak,
        mean=mean,
        source=reading.source if reading.batch is not None or setting.tokens else f"{reading.source}: {peak.length:,} tokens a row",
        memory=memory,
        loading=made + memory.base,
        flops=flops,
        feature_cache=reading.images * tokens * width * item if cached else 0,
        cached=cached,
    )


# --- what the model is -----------------------------------------------------------------------------------------------


def _sizes(model: VisionLanguageModel) -> list[PartSize]:
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
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def _held(model: VisionLanguageModel) -> tuple[int, int, int]:
    """Bytes of frozen weights, trained ones, and adapters."""
    named = [(name, p.requires_grad, p.numel() * p.element_size()) for m in parts(model).values() for name, p in m.named_parameters()]
    adapters = sum(size for name, _, size in named if "lora_" in name)
    trained = sum(size for name, train, size in named if train and "lora_" not in name)
    return sum(map(_weights, parts(model).values())) - trained - adapters, trained, adapters


def _largest_layer(model: VisionLanguageModel) -> int:
    """Bytes of the largest module that has weights of its own, which ZeRO-3 gathers whole."""
    return max(sum(p.numel() * p.element_size() for p in module.parameters(recurse=False)) for module in model.modules())


def _attention_width(model: VisionLanguageModel) -> float:
    """Layers x heads x head width of the LLM, as in 12 L h d_h A; of each stack, for an encoder-decoder."""
    config = model.llm.model.config.get_text_config()
    head = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // config.num_attention_heads
    return float(config.num_hidden_layers * config.num_attention_heads * head)


# --- what a step takes -----------------------------------------------------------------------------------------------

ROWS = ("tokens", "label_tokens", "supervised", "images")
"""What the rows of a matrix product are a multiple of, as `Work` names it."""


def _traced(model: VisionLanguageModel, stage: Recipe, batch: Batch, features: tuple[int, int] | None) -> np.ndarray:
    """Bytes of the three peaks by kind (9 figures), and FLOPs for each row of ROWS (4 figures)."""
    fake, tower = FakeTensorMode(allow_non_fake_inputs=True), model.tower
    dtype, count = next(tower.parameters()).dtype, len(batch.media_index.unique())
    to_fake(model, fake)
    model.train()
    if stage.train.gradient_checkpointing:
        model.llm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with fake:
        shown: Any = None
        if count and features:
            shown = torch.empty(count, *features, dtype=dtype)
        elif count:
            shown = torch.empty(count, 3, tower.image_size, tower.image_size, dtype=torch.uint8)
    given = replace(batch, **{"features" if features else "pixels": shown})
    half, vocabulary = DTYPES[stage.train.precision], model.llm.model.get_input_embeddings().num_embeddings
    align = stage.objective.kind == "contrastive"

    def step() -> torch.Tensor:
        with torch.autocast("cpu", dtype=half, enabled=half != torch.float32):
            found = model(given, align=align)
            return found.images.sum() + found.captions.sum() if isinstance(found, Alignment) else found.sum

    def measure() -> np.ndarray:
        with _multiplied(model, batch) as products:
            trace = trace_step(model, step, vocabulary, fake)
        for parameter in model.parameters():
            parameter.grad = None
        return np.concatenate([*trace.peaks(accumulating=stage.train.gradient_accumulation > 1), products])

    with disable_input_dtype_casting(model, active=half != torch.float32):
        return by_depth(model.llm, measure)


@contextmanager
def _multiplied(model: VisionLanguageModel, batch: Batch) -> Iterator[np.ndarray]:
    """Counts FLOPs of the matrix products with weights, recomputed ones once: 2 a weight forward and for each gradient."""
    products, seen, handles = np.zeros(len(ROWS)), set(), []
    rows, said = batch.input_ids.numel(), int((batch.labels != IGNORE_INDEX).sum())
    place_of = {said: 2, batch.labels.numel(): 1, rows: 0}
    per_row = (rows, batch.labels.numel(), max(said, 1), max(len(batch.media_index), 1))

    def count(module: Any, given: tuple[torch.Tensor, ...], _: Any) -> None:
        if id(module) in seen or module.weight is None:
            return
        seen.add(id(module))
        taken = given[0].numel() // given[0].shape[-1]
        place = 2 if module is model.llm.head else place_of.get(taken, 3)
        taken = said if module is model.llm.head else taken
        products[place] += (
            (2 + 2 * given[0].requires_grad + 2 * module.weight.requires_grad) * count_of(module.weight) * taken / per_row[place]
        )

    for part in (model.connector, model.llm):
        handles += [layer.register_forward_hook(count) for layer in part.modules() if is_linear(layer)]
    try:
        yield products
    finally:
        for handle in handles:
            handle.remove()


def _memory(peaks: np.ndarray, held: tuple[int, int, int], trained: int, layer: int, setting: _Setting) -> Memory:
    """One process's share at the fullest moment; `trained` numbers train, of which the `layer` largest bytes are gathered."""
    zero, ranks = setting.zero, setting.processes

    def share(size: float, stage: int) -> int:
        return math.ceil(size / ranks) if zero >= stage else math.ceil(size)

    gradients = 4 * trained
    exchange = 0
    if ranks > 1:
        exchange = (gradients if zero == 0 else min(gradients, BUCKET)) + (2 * layer if zero == 3 else 0)
    # The optimizer's step comes after the backward pass: it finds all gradients and no activations.
    moments = [*peaks.reshape(3, 3), np.array([0, 0, gradients])]
    activations, logits, own = max(
        ((int(a), int(o), share(float(g), 2)) for a, o, g in moments),
        key=sum,
    )
    frozen, full, adapters = (share(size, 3) for size in held)
    return Memory(
        frozen=frozen,
        trained=full,
        adapters=adapters,
        optimizer=share(8 * trained, 1),
        gradients=own,
        activations=activations,
        logits=logits,
        exchange=exchange,
        base=setting.base,
    )


def resident() -> int:
    """Bytes of this process in memory, which are the interpreter's and the libraries' as long as no model is loaded."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- what to change --------------------------------------------------------------------------------------------------


def _advice(recipe: Recipe, found: Plan, setting: _Setting) -> list[Advice]:
    """Changes that need less than the plan, each planned as the plan was; the least first."""
    advice = []
    for text, change, quantize, at in _changes(recipe, setting):
        changed = _with(recipe, change, quantize)
        where = replace(setting, zero=at, processes=max(setting.processes, 2) if at > setting.zero else setting.processes)
        stages = _stage_plans(changed, *readings(changed, where.tokens, where.processes), where)
        written = _written("train", change(recipe.train))
        for number, stage in enumerate(recipe.stages):
            # What a stage sets itself is not changed by the common part.
            own = {key: value for key, value in change(recipe.resolved_stages()[number][1].train).items() if key in stage.train}
            written += _written(f"stages.{number}.train", own)
        written += [f"model.llm.quantize={quantize}"] if quantize else []
        advice.append(Advice(text, written, at, max(stage.needed for stage in stages)))
    return sorted((one for one in advice if one.needed < found.needed), key=lambda one: one.needed)


def _written(where: str, values: dict[str, Any]) -> list[str]:
    """Values as overrides of the command line."""
    return [f"{where}.{key}={json.dumps(value)}" for key, value in values.items()]


def _changes(recipe: Recipe, setting: _Setting) -> Iterator[tuple[str, Change, str | None, int]]:
    stages = [stage for _, stage in recipe.resolved_stages()]
    divided = all(stage.train.batch_size > 1 or stage.train.batch_tokens for stage in stages)
    unchecked = not all(stage.train.gradient_checkpointing for stage in stages)
    lone = all(not rule.match.startswith(("llm", "*")) for stage in stages for rule in stage.tune if rule.how == "full")
    packs = recipe.model.llm.quantize is None and recipe.model.llm.scratch is None and lone
    none: Change = lambda train: {}  # noqa: E731
    if divided:
        yield "half the batch, twice the accumulation (the same gradient)", _halved, None, setting.zero
    if any(stage.train.batch_size > 2 and not stage.train.batch_tokens for stage in stages):
        yield "one row at a time (the same gradient)", _alone, None, setting.zero
    if unchecked:
        yield "gradient checkpointing (a third more work)", _checkpointed, None, setting.zero
    if packs:
        yield "the LLM's frozen weights in nf4", none, "nf4", setting.zero
    if divided + unchecked + packs > 1:
        both: Change = lambda train: (_halved(train) if divided else {}) | (_checkpointed(train) if unchecked else {})  # noqa: E731
        yield "all of these", both, "nf4" if packs else None, setting.zero
    ranks = max(setting.processes, 2)
    # Packed 4- and 8-bit weights can't be divided among processes.
    for stage in (2,) if recipe.model.llm.quantize else (2, 3):
        if setting.zero < stage:
            yield f"DeepSpeed ZeRO-{stage} on {ranks} processes", none, None, stage


def _halved(train: TrainSection) -> dict[str, Any]:
    if train.batch_tokens:
        smaller = {"batch_tokens": max(train.batch_tokens // 2, 1)}
    else:
        smaller = {"batch_size": max(train.batch_size // 2, 1)}
    return {**smaller, "gradient_accumulation": 2 * train.gradient_accumulation}


def _alone(train: TrainSection) -> dict[str, Any]:
    return {"batch_size": 1, "gradient_accumulation": train.batch_size * train.gradient_accumulation}


def _checkpointed(train: TrainSection) -> dict[str, Any]:
    return {"gradient_checkpointing": True}


def _with(recipe: Recipe, change: Change, quantize: str | None) -> Recipe:
    """The recipe with every stage's train section changed, and its LLM quantised."""
    made = recipe.model_dump(exclude_unset=True)
    made["train"] |= change(recipe.train)
    for stage, (_, resolved) in zip(made.get("stages", []), recipe.resolved_stages(), strict=False):
        own = stage.get("train", {})
        stage["train"] = own | {key: value for key, value in change(resolved.train).items() if key in own}
    if quantize:
        made["model"]["llm"]["quantize"] = quantize
    return Recipe.model_validate(made)
