"""Predicts what a recipe needs: parameters, memory by cause and FLOPs, from configs alone.

The model is built on the meta device and tuned by the real rules. Its real forward and backward
pass is traced on fake tensors (`memory_plan.tracer`). The share of weights, gradients and optimizer
states of each process follows from ZeRO's definition.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlm_tune.config.load import as_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.memory_plan.advice import changed, changes, written
from vlm_tune.memory_plan.batch_stats import readings
from vlm_tune.memory_plan.cuda import CONTEXT
from vlm_tune.memory_plan.heap import allocator
from vlm_tune.memory_plan.machine import measure
from vlm_tune.memory_plan.results import Advice, Offload, Plan
from vlm_tune.memory_plan.setting import Setting, check_arguments, check_setting, parse_size
from vlm_tune.memory_plan.stage_plan import stage_plans
from vlm_tune.precision import DTYPES
from vlm_tune.resources import kernel_setting, peak_resident_memory


def plan(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] | dict[str, Any] = (),
    *,
    gpu_memory: str | int | None = None,
    processes: int = 1,
    zero: int = 0,
    offload: Offload = "none",
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
    check_arguments(gpu_memory, processes, zero, offload, tokens)
    limit = parse_size(gpu_memory) if isinstance(gpu_memory, str) else gpu_memory
    gpu = limit is not None or torch.cuda.is_available()
    setting = Setting(
        processes,
        zero,
        tokens,
        gpu,
        offload,
        CONTEXT if gpu else resident(),
    )
    check_setting(loaded, setting)
    with kernel_setting(loaded.train.kernels):
        planned = _without_advice(loaded, setting, limit)
        advice = _advice(loaded, planned, setting) if advise or planned.fits is False else []
    return replace(planned, advice=advice, seconds=round(time.perf_counter() - started, 2))


def _without_advice(recipe: Recipe, setting: Setting, limit: int | None) -> Plan:
    """The plan of a recipe; `limit` is the memory of a device, None if it is not set."""
    stages = stage_plans(recipe, *readings(recipe, setting.tokens, setting.processes), setting)
    return Plan(
        name=recipe.name,
        device="gpu" if setting.gpu else "cpu",
        precision=recipe.train.precision,
        quantize=recipe.model.llm.quantize,
        processes=setting.processes,
        zero=setting.zero,
        offload=setting.offload,
        gpu_memory=limit,
        allocator=None if setting.gpu else allocator(),
        stages=stages,
        seconds=0.0,
        # A given memory size, and several processes, mean another machine than this one.
        machine=measure(recipe.train.precision, DTYPES[recipe.train.precision])
        if limit is None and setting.processes == 1
        else None,
    )


def resident() -> int:
    """Resident bytes of this process.

    As long as no model is loaded, they are the interpreter's and the libraries'.
    """
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_resident_memory()


def _advice(recipe: Recipe, planned: Plan, setting: Setting) -> list[Advice]:
    """Changes that need less than the plan, each planned in the same way, least memory first."""
    advice = []
    for text, change, quantize, at in changes(recipe, setting.processes, setting.zero):
        other = changed(recipe, change, quantize)
        where = replace(
            setting,
            zero=at,
            processes=max(setting.processes, 2) if at > setting.zero else setting.processes,
        )
        stages = stage_plans(other, *readings(other, where.tokens, where.processes), where)
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
