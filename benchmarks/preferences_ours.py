"""Our side of `benchmarks.preferences`: a training by `vlm_tune.dpo`, one step at a time.

Takes a request as a JSON argument, which `benchmarks.turns.Comparison.running` writes. After
a line of standard input it takes a step, and prints {"seconds", "loss", "logps/chosen",
"logps/rejected"}.
"""

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

import vlm_tune
from vlm_tune.config.load import parse_recipe
from vlm_tune.events import Event, StageStart, TrainSteps

Command = Callable[..., Any]
"""One of `vlm_tune.sft`, `vlm_tune.dpo` and `vlm_tune.grpo`."""


def recipe_of(request: dict[str, Any], output: Path) -> str:
    """The recipe of a request: what `benchmarks/peers/train_dpo.py` gives TRL."""
    return f"""
name: preferences
output: {output}
model: {{pretrained: {request["model"]}}}
data:
  template: chatml
  group: image
  max_length: 2048
  train: [{{kind: file, path: {request["material"]}/{request["rows"]}.jsonl, form: preference}}]
tune:
  - {{match: "tower.*", how: frozen}}
  - {{match: "connector.*", how: frozen}}
  - {{match: "llm.*", how: lora, r: 16, lora_alpha: 32, target_modules: all-linear}}
objective: {{kind: dpo, loss_type: [sigmoid, sft], loss_weights: [1.0, 0.2], beta: 0.1,
  reference: adapter_off}}
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
    recipe_of: Callable[[dict[str, Any], Path], str], command: Command, names: Sequence[str]
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


if __name__ == "__main__":
    take_steps(recipe_of, vlm_tune.dpo, ("logps/chosen", "logps/rejected"))
