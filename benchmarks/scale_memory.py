"""Memory of each rank by engine: two processes train a 61M-parameter decoder in full, in fp32.

    python -m benchmarks.scale_memory [--processes 2] [--engines ddp zero1 zero2 zero3 fsdp]

The figures are bytes allocated by malloc beyond those before the model was built, in MB (10^6
bytes), for every engine and rank:

- `built`: the peak until the engine has the model.
- `held`: the largest after the backward passes of the second step (which has two) and at that
  optimizer step: weights, gradients, the optimizer's state and the engine's own buffers, without
  activations.
- `peak`: the peak over both steps, sampled every two milliseconds.
- `theory`: 4 bytes a parameter for weights, gradients, each of Adam's two moments and, under
  DeepSpeed, the optimizer's own copy of the weights; what an engine shards counts once over all
  ranks.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    **{f"zero{stage}": {"kind": "deepspeed", "stage": stage} for stage in range(4)},
    "fsdp": {"kind": "fsdp"},
}
WHOLE = {"ddp": 16, "zero0": 16, "zero1": 8, "zero2": 4, "zero3": 0, "fsdp": 0}
"""Bytes per parameter that every rank has."""
SHARED = {"ddp": 0, "zero0": 0, "zero1": 12, "zero2": 16, "zero3": 20, "fsdp": 16}
"""Bytes per parameter that are sharded over the ranks."""
RECIPE = """
name: memory
output: {output}
model:
  tower: {{kind: open_clip, config: {{layers: 1, width: 64, head_width: 32, patch_size: 16, \
image_size: 32}}}}
  connector: {{kind: linear}}
  llm: {{kind: causal, scratch: {{model_type: llama, vocab_size: 512, config: {{hidden_size: 640, \
intermediate_size: 1792,
    num_hidden_layers: 12, num_attention_heads: 10, num_key_value_heads: 10, \
max_position_embeddings: 256}}}}}}
data:
  train: [{{kind: easy_vqa, split: train, limit: 64}}]
  template: chatml
  max_length: 128
tune: [{{match: "*", how: full}}]
train: {{steps: 2, batch_size: 2, gradient_accumulation: 2, precision: fp32, cache_features: false}}
evaluate: {{samples: 0}}
engine: {engine}
"""


class _Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "free",
            "smalls",
            "maps",
            "mapped",
            "u",
            "fs",
            "used",
            "fordblks",
            "keepcost",
        )
    ]


def given() -> float:
    """Memory that malloc has allocated and not freed, in MB: tensors of Python and of C++."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    info = mallinfo()
    return (info.used + info.mapped) / 1e6


class Peak(threading.Thread):
    """A thread that samples the peak of malloc's allocations since the last call of `taken`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0.0

    def run(self) -> None:
        while True:
            self.most = max(self.most, given())
            time.sleep(0.002)

    def taken(self) -> float:
        most = self.most
        self.most = 0.0
        return most


def worker(recipe: Path, output: Path) -> None:
    """One rank: trains up to its second step, writes its figures, and exits."""
    from vlm_tune.api import sft
    from vlm_tune.config.load import load_recipe
    from vlm_tune.train import run
    from vlm_tune.train.engines.base import Engine
    from vlm_tune.train.engines.deepspeed_zero import DeepSpeed
    from vlm_tune.train.engines.fsdp import Fsdp

    figures: dict[str, float] = {}
    build = run.build
    peak = Peak()

    def built(*arguments: Any, **options: Any) -> Any:
        figures.update(given=given(), steps=0, held=0)
        peak.start()
        return build(*arguments, **options)

    def prepared(prepare: Any) -> Any:
        def done(engine: Engine, *arguments: Any) -> None:
            prepare(engine, *arguments)
            figures["built"] = peak.taken() - figures["given"]

        return done

    def noted(backward: Any) -> Any:
        def passed(engine: Engine, loss: Any) -> None:
            backward(engine, loss)
            if figures["steps"]:
                figures["held"] = max(figures["held"], given() - figures["given"])

        return passed

    def measured(step: Any) -> Any:
        def stepped(engine: Engine) -> None:
            if figures["steps"]:
                figures["held"] = max(figures["held"], given() - figures["given"])
            step(engine)
            figures["steps"] += 1
            if figures["steps"] < 2:
                return
            figures["peak"] = peak.taken() - figures["given"]
            figures["parameters"] = sum(
                getattr(parameter, "ds_numel", parameter.numel())
                for _, parameter in engine._named()
            )
            output.with_suffix(f".{os.environ['RANK']}.json").write_text(json.dumps(figures))
            engine.accelerator.wait_for_everyone()
            os._exit(0)

        return stepped

    run.build = built
    for kind in (Engine, DeepSpeed, Fsdp):
        for name, wrapped in (("prepare", prepared), ("step", measured), ("backward", noted)):
            if name in vars(kind):
                setattr(kind, name, wrapped(vars(kind)[name]))
    sft(load_recipe(recipe))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    options = parser.parse_args()
    print(f"{'engine':8} {'theory':>8}  {'held, MB by rank':19} {'built':19} {'peak':19}")
    for name in options.engines:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            (folder / "recipe.yaml").write_text(
                RECIPE.format(output=folder / "run", engine=json.dumps(ENGINES[name]))
            )
            code = (
                "import sys; from vlm_tune.launching import launch; "
                "sys.exit(launch(sys.argv[2:], int(sys.argv[1])))"
            )
            rank = [
                sys.executable,
                "-m",
                "benchmarks.scale_memory",
                "--worker",
                str(folder / "recipe.yaml"),
                str(folder / "found"),
            ]
            subprocess.run(
                [sys.executable, "-c", code, str(options.processes), *rank],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            by_rank = [
                json.loads((folder / f"found.{rank}.json").read_text())
                for rank in range(options.processes)
            ]
        theory = by_rank[0]["parameters"] * (WHOLE[name] + SHARED[name] / options.processes) / 1e6
        columns = [
            " ".join(f"{figures[key]:7.0f}" for figures in by_rank)
            for key in ("held", "built", "peak")
        ]
        print(f"{name:8} {theory:8.0f}  {columns[0]:19} {columns[1]:19} {columns[2]}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
