"""The engines by their kind in a recipe, and the choice between recipe and accelerate config."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from accelerate import Accelerator

from vlm_tune.compat import shards_bytes
from vlm_tune.config.engine import AnyEngine, AutoEngine, DdpEngine, DeepSpeedEngine, FsdpEngine
from vlm_tune.config.recipe import Recipe
from vlm_tune.config.rules import contradictions
from vlm_tune.config.yaml_source import dotted_name
from vlm_tune.errors import Problem, RecipeError
from vlm_tune.model.pretrained.native import check_shards
from vlm_tune.train.accelerator import BACKENDS
from vlm_tune.train.engines.base import WRAPS, Engine
from vlm_tune.train.engines.deepspeed_zero import DeepSpeed
from vlm_tune.train.engines.fsdp import Fsdp


def resolve_engine(section: AnyEngine) -> AnyEngine:
    """The engine to train with: the recipe's, else that of an accelerate config, else DDP.

    Removes the config's engine from the environment, so that accelerate only joins the processes.
    Raises `RecipeError` if recipe and config name different engines.
    """
    named = _configured()
    for name in WRAPS:
        os.environ.pop(name, None)
    if isinstance(section, AutoEngine):
        return named or DdpEngine(kind="ddp")
    if named is not None and named.kind != section.kind:
        raise RecipeError(
            [
                Problem(
                    "engine",
                    f"the recipe says {section.kind} and the accelerate config {named.kind}; "
                    "drop one of them",
                )
            ]
        )
    return section


def engine_of(recipe: Recipe) -> AnyEngine:
    """The engine to train the recipe with, as `resolve_engine`.

    Raises `RecipeError` also for what the engine of an accelerate config can't train, as a recipe
    that names the engine is refused when it is read, for packed weights that FSDP2 of the
    installed torch can't shard, and for a native model that can't be sharded.
    """
    section = resolve_engine(recipe.engine)
    problems: list[Problem] = []
    if section.kind != recipe.engine.kind:
        for _, stage in recipe.resolved_stages():
            named = stage.model_dump(exclude_unset=True) | {"engine": section.model_dump()}
            faults = contradictions(named)
            problems += [Problem(dotted_name(path), message) for path, message in faults]
    packed = getattr(recipe.model.llm, "quantize", None)
    if packed and isinstance(section, FsdpEngine) and not shards_bytes():
        message = (
            "FSDP2 shards packed weights from torch 2.12 on, and this is "
            f"{torch.__version__}; install a newer torch, or use deepspeed with stage 3, or ddp"
        )
        problems.append(Problem("engine", message))
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    check_shards(recipe, section)
    return section


def _configured() -> AnyEngine | None:
    """The engine in the config of `accelerate launch`; None where it names none."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return FsdpEngine(
            kind="fsdp", offload=os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return None
    from accelerate.utils import DeepSpeedPlugin

    config = DeepSpeedPlugin().deepspeed_config
    zero = {
        key: value
        for key, value in config["zero_optimization"].items()
        if value not in (None, "auto")
    }
    places = {
        what: zero.pop(key, None) or {}
        for what, key in (("optimizer", "offload_optimizer"), ("parameters", "offload_param"))
    }
    offload = [what for what, place in places.items() if place.get("device") == "cpu"]
    section = {
        "kind": "deepspeed",
        "stage": zero.pop("stage", 2),
        "offload": offload,
        "config": {"zero_optimization": zero},
    }
    return DeepSpeedEngine.model_validate(section)


def build_engine(section: AnyEngine, accelerator: Accelerator) -> Engine:
    """The engine for a section that `resolve_engine` returned."""
    if isinstance(section, AutoEngine | DdpEngine):
        return Engine(accelerator)
    if not dist.is_initialized():
        # A single process: the engines need a process group all the same.
        backend = BACKENDS if accelerator.device.type == "cuda" else "gloo"
        # HashStore is documented, but torch's module does not list it.
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    return (
        DeepSpeed(accelerator, section)
        if isinstance(section, DeepSpeedEngine)
        else Fsdp(accelerator, section)
    )
