"""A training of ours, one step at a time, for the benches that take steps in turns with TRL."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from vlm_tune.config.load import parse_recipe
from vlm_tune.events import Event, StageStart, TrainSteps

Request = dict[str, Any]
Command = Callable[..., Any]
"""One of `vlm_tune.sft`, `vlm_tune.dpo` and `vlm_tune.grpo`."""


def lora_recipe(request: Request, output: Path, *, objective: str = "", form: str = "") -> str:
    """A recipe of LoRA on the LLM over the request's model, as the peers' steps train it.

    Args:
        request: What `benchmarks.turns.Comparison.running` writes.
        output: The run's folder.
        objective: The recipe's line of it, where it is not instruction tuning.
        form: The form of the rows, where it is named.
    """
    named = f", form: {form}" if form else ""
    return f"""
name: bench
output: {output}
model: {{pretrained: {request["model"]}}}
data:
  template: chatml
  group: image
  max_length: 2048
  train: [{{kind: file, path: {request["material"]}/{request["rows"]}.jsonl{named}}}]
tune:
  - {{match: "tower.*", how: frozen}}
  - {{match: "connector.*", how: frozen}}
  - {{match: "llm.*", how: lora, r: 16, lora_alpha: 32, target_modules: all-linear}}
{objective}
train: {{steps: {request["steps"]}, batch_size: {request["batch"]}, precision: \
{request["precision"]}, log_every: 1, cache_features: false,
  learning_rate: {request["learning_rate"]}, schedule: {{kind: linear, warmup: 0.0}},
  checkpoints: {{every: 1000000}}}}
evaluate: {{samples: 0}}
"""


class Turns:
    """Waits for a line before every step; its seconds include reading the step's rows.

    Prints each step's seconds, its loss and the figures of these `names`. With `cpu_time` seconds
    are the process's own, not the clock's.
    """

    def __init__(self, lines: Any, names: Sequence[str], *, cpu_time: bool) -> None:
        self.now = time.process_time if cpu_time else time.perf_counter
        self.lines = lines
        self.names = names
        self.began = 0.0

    def __call__(self, event: Event) -> None:
        """Takes the run's events: its start, and each step's figures."""
        if isinstance(event, TrainSteps):
            seconds = self.now() - self.began
            metrics = event.metrics or {}
            figures = {name: metrics[name] for name in self.names}
            line = json.dumps({"seconds": seconds, "loss": event.loss, **figures})
            print(line, file=self.lines, flush=True)
        # After the last step too, since the memory of a process that has ended can't be read.
        if isinstance(event, StageStart | TrainSteps):
            if not sys.stdin.readline():
                sys.exit()
            self.began = self.now()


def take_steps(
    recipe_of: Callable[[Request, Path], str], command: Command, names: Sequence[str]
) -> None:
    """Trains for the steps of the request on the command line, one for each line that is read.

    Args:
        recipe_of: The recipe of a request and an output folder.
        command: The function that trains.
        names: The figures to print of each step, besides its loss.
    """
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    lines = sys.stdout
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        recipe = parse_recipe(recipe_of(request, Path(folder) / "run"))
        command(recipe, test=False, show=Turns(lines, names, cpu_time=request["cpu_time"]))
