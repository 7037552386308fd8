"""One of several processes that train the recipes of a list in turn.

Notes gradients and sample ids beside each.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch._dynamo.utils import counters

from vlm_tune.api import sft, verify_run
from vlm_tune.config.load import load_recipe
from vlm_tune.errors import Interrupted
from vlm_tune.model.weights import whole_tensor
from vlm_tune.train.engines.base import Engine
from vlm_tune.train.engines.deepspeed_zero import DeepSpeed
from vlm_tune.train.engines.fsdp import Fsdp
from vlm_tune.train.trainer import StageLoop


def gradients(engine: Engine) -> dict[str, torch.Tensor]:
    """The gradient that a step is about to be taken with, whole, by parameter."""
    by_name = {}
    for name, parameter in engine._named():
        if isinstance(engine, DeepSpeed):
            from deepspeed.utils import safe_get_full_grad

            value: Any = safe_get_full_grad(parameter)
        else:
            value = parameter.grad
        assert value is not None, f"{name} has no gradient"
        by_name[name] = whole_tensor(value).clone(memory_format=torch.contiguous_format)
    return by_name


def record(noted: dict[str, Any]) -> None:
    """Notes the first step's gradient, and the sample ids of all steps.

    For FSDP also how many parameters have a gradient after each micro-batch of the first step, and
    the types in which the connector's (a native model's head's) were gathered. And which of
    Python's collectives are called from the beginning of each step to that of the next.
    """

    def before(clip: Any) -> Any:
        def clipped(engine: Engine, factor: float) -> Any:
            if not noted["gradients"]:
                noted["gradients"] = gradients(engine)
            return clip(engine, factor)

        return clipped

    for kind in (Engine, DeepSpeed, Fsdp):
        kind.clip = before(kind.clip)
    backward = Fsdp.backward

    def backwarded(engine: Fsdp, loss: torch.Tensor) -> None:
        model = engine.inner
        # A native model has its connector inside of its own module.
        part = model.llm.head if model.llm.native else model.connector
        gathered = {str(each.dtype) for each in part.parameters()}
        backward(engine, loss)
        if not noted["gradients"]:
            noted["gathered"] = sorted(gathered)
            noted["summed"].append(sum(each.grad is not None for each in engine._parameters()))

    Fsdp.backward = backwarded
    whole_step = StageLoop._step

    def stepped(loop: StageLoop, batches: Any, step: int, *rest: Any) -> float:
        noted["collectives"].append([])
        noted["ids"][step] = [
            identity for batch in batches if batch.supervised for identity in batch.ids
        ]
        noted["images"].append(sum(len(batch.media_index) for batch in batches))
        if step == noted["stop"]:
            os.kill(os.getpid(), signal.SIGINT)
        return whole_step(loop, batches, step, *rest)

    StageLoop._step = stepped

    def counted(name: str, collective: Any) -> Any:
        def called(*arguments: Any, **named: Any) -> Any:
            if noted["collectives"]:
                noted["collectives"][-1].append(name)
            return collective(*arguments, **named)

        return called

    for name in ("all_gather", "all_reduce", "all_gather_object", "broadcast", "barrier"):
        setattr(dist, name, counted(name, getattr(dist, name)))


def main(runs: list[dict[str, Any]]) -> None:
    """Trains [{"recipe": path, "resume": false, "stop": step or null, "verify": false}, ...]."""
    noted: dict[str, Any] = {}
    record(noted)
    # Traced and differentiated as for the compiler, which would take minutes.
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    rank = os.environ.get("RANK", "0")
    for run in runs:
        path = Path(run["recipe"])
        noted.update(gradients={}, ids={}, images=[], summed=[], gathered=[], collectives=[])
        noted["stop"] = run.get("stop")
        counters.clear()
        try:
            folder = sft(load_recipe(path), resume=run.get("resume", False)).folder
            if run.get("verify"):
                report = verify_run(folder)
                if rank == "0":
                    path.with_suffix(".verified.json").write_text(json.dumps(report.summary()))
        except Interrupted:
            assert run.get("stop")
        except BaseException as error:
            print(
                f"rank {rank}: {path.stem}: {type(error).__name__}: {error}",
                file=sys.stderr,
                flush=True,
            )
            raise
        print(f"rank {rank}: {path.stem}", file=sys.stderr, flush=True)
        path.with_suffix(f".rank{rank}.json").write_text(
            json.dumps(
                {
                    **{
                        name: noted[name]
                        for name in ("ids", "images", "summed", "gathered", "collectives")
                    },
                    "graphs": counters["stats"]["unique_graphs"],
                    "breaks": len(counters["graph_break"]),
                }
            )
        )
        if rank == "0":
            save_file(noted["gradients"], path.with_suffix(".safetensors"))
        if run is runs[0]:
            # All libraries are imported: the collections at each end of training need not go
            # through their objects.
            gc.collect()
            gc.freeze()
