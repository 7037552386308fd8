"""Kills and resumes a training run at random moments, and compares it with an uninterrupted run.

The signal is SIGKILL. Every attempt is a fork of this process, which has loaded the libraries. So
it starts at once, and dies like any process.

Run: python -m benchmarks.random_kills [--kills 50] [--steps 400] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from vlm_tune.api import sft
from vlm_tune.config.load import parse_recipe
from vlm_tune.config.recipe import Recipe
from vlm_tune.events import Event, TrainSteps
from vlm_tune.train.checkpoint import checkpoints
from vlm_tune.train.replay import different_tensors
from vlm_tune.train.step_trace import read_trace

RECIPE = """
name: random-kills
output: {output}
model:
  tower: {{kind: open_clip, config: {{layers: 2, width: 64, head_width: 32, patch_size: 16, \
image_size: 32}}}}
  connector: {{kind: mlp, norm: true}}
  llm:
    kind: causal
    scratch:
      model_type: llama
      vocab_size: 400
      config: {{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, \
num_attention_heads: 2, num_key_value_heads: 1}}
data:
  train: [{{kind: file, path: {rows}}}]
  validation: [{{kind: file, path: {rows}, limit: 4}}]
  template: chatml
  max_length: 128
  workers: 0
tune:
  - {{match: "tower.*", how: frozen}}
  - {{match: "connector.*", how: full}}
  - {{match: "llm.*", how: lora, r: 4, lora_dropout: 0.2, target_modules: all-linear}}
train:
  steps: {steps}
  batch_size: 3
  gradient_accumulation: 2
  learning_rate: 1.0e-3
  precision: fp32
  log_every: 1
  checkpoints: {{every: 5, keep: 2}}
evaluate: {{every: {evaluate}, max_new_tokens: 4, samples: 0}}
"""


def write_rows(folder: Path) -> Path:
    """Writes forty questions about ten noisy images."""
    drawn = np.random.default_rng(0)
    rows = []
    for number in range(10):
        color = drawn.integers(0, 256, 3)
        pixels = (color + drawn.integers(-20, 20, (32, 32, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        for name, value in zip(
            ("red", "green", "blue", "brightest"),
            [*color.tolist(), int(color.argmax())],
            strict=True,
        ):
            turns = [
                {"role": "user", "content": f"how {name}?"},
                {"role": "assistant", "content": str(value)},
            ]
            rows.append(json.dumps({"messages": turns, "images": [f"{number}.png"]}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


@dataclass
class Moment:
    """When an attempt is killed: `seconds` after its start, or after `step` steps of the run."""

    seconds: float
    step: int | None = None


def attempt(recipe: Recipe, *, resume: bool, kill: Moment | None) -> float | None:
    """Runs in a fork, to the end or until it is killed at a moment; the seconds to its first step.

    A run that is to be killed kills itself before its last step at the latest: on a busy machine
    this process may look too late, and how long a start takes changes.
    """

    def stop_in_time(event: Event) -> None:
        if kill is not None and isinstance(event, TrainSteps) and event.step >= event.of - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    trace = Path(recipe.output) / "stages" / "1-main" / "trace.jsonl"
    before = trace.stat().st_mtime_ns if trace.is_file() else 0
    started = time.monotonic()
    first = None
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sft(recipe, resume=resume, show=stop_in_time)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    deadline = started + kill.seconds if kill is not None and kill.step is None else None
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            if code != (0 if kill is None else -signal.SIGKILL):
                raise RuntimeError(f"the run ended with code {code}")
            return first
        # A resumed run first removes the steps it will repeat from the trace, which rewrites the
        # file.
        if trace.is_file() and trace.stat().st_mtime_ns != before:
            first = first or time.monotonic() - started
            if (
                kill is not None
                and kill.step is not None
                and deadline is None
                and trace.read_bytes().count(b"\n") >= kill.step
            ):
                deadline = time.monotonic() + kill.seconds
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return first
        time.sleep(0.002)


def kill_and_compare(folder: Path, *, kills: int, steps: int, seed: int) -> dict[str, Any]:
    """Kills a run `kills` times at moments drawn from `seed`, and compares it with a whole run."""
    rows = write_rows(folder)
    os.environ["VLM_TUNE_CACHE"] = str(folder / "cache")
    recipes = {
        name: parse_recipe(
            RECIPE.format(output=folder / name, rows=rows, steps=steps, evaluate=max(steps // 8, 1))
        )
        for name in ("whole", "killed")
    }
    started = time.monotonic()
    start_up = attempt(recipes["whole"], resume=False, kill=None)
    assert start_up is not None
    run = folder / "killed"
    drawn = random.Random(seed)
    stage = run / "stages" / "1-main"
    where: Counter[str] = Counter()
    for done in range(kills):
        # A third of the kills hit the start. The others hit any moment of the kill's share of the
        # steps, or of the save after them.
        early = drawn.random() < 1 / 3
        step = int(steps * (done + drawn.random()) / (kills + 1))
        kill = Moment(drawn.uniform(0, start_up)) if early else Moment(drawn.uniform(0, 0.05), step)
        attempt(recipes["killed"], resume=(run / "recipe.yaml").is_file(), kill=kill)
        where[
            "in a save"
            if list(run.glob("stages/*/checkpoints/.*"))
            else "at the start"
            if early
            else "between saves"
        ] += 1
        print(f"kill {done + 1} at step {len(read_trace(stage))}", file=sys.stderr, flush=True)
    attempt(recipes["killed"], resume=(run / "recipe.yaml").is_file(), kill=None)
    last = checkpoints(stage)[-1].name
    return {
        "kills": where.total(),
        "steps": steps,
        "where": dict(where),
        "model": different_tensors(folder / "whole" / "model", run / "model"),
        "state": different_tensors(
            *(
                folder / name / "stages" / "1-main" / "checkpoints" / last
                for name in ("whole", "killed")
            )
        ),
        "trace": read_trace(folder / "whole" / "stages" / "1-main") == read_trace(stage),
        "tensors": sum(
            len(load_file(path))
            for folder in (run / "model", checkpoints(stage)[-1])
            for path in folder.rglob("*.safetensors")
        ),
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    """Prints the comparison as JSON; exits with 1 if the runs differ or not all kills happened."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        comparison = kill_and_compare(
            Path(folder), kills=options.kills, steps=options.steps, seed=options.seed
        )
    print(json.dumps(comparison, indent=1))
    raise SystemExit(
        not (
            comparison["kills"] == options.kills
            and comparison["trace"]
            and not comparison["model"]
            and not comparison["state"]
        )
    )


if __name__ == "__main__":
    main()
