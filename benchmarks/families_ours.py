"""Our side of `benchmarks.families`: a training by `vlm_tune.sft`, one step at a time.

Takes a request as a JSON argument, which `benchmarks.turns.Comparison.running` writes. After a line
of standard input it takes a step, and prints {"seconds", "loss"}.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import vlm_tune
from benchmarks.preferences_ours import take_steps


def recipe_of(request: dict[str, Any], output: Path) -> str:
    """The recipe of a request: what `benchmarks/peers/train_family.py` gives TRL."""
    return f"""
name: families
output: {output}
model: {{pretrained: {request["model"]}}}
data:
  template: chatml
  group: image
  max_length: 2048
  train: [{{kind: file, path: {request["material"]}/{request["rows"]}.jsonl}}]
tune:
  - {{match: "tower.*", how: frozen}}
  - {{match: "connector.*", how: frozen}}
  - {{match: "llm.*", how: lora, r: 16, lora_alpha: 32, target_modules: all-linear}}
train: {{steps: {request["steps"]}, batch_size: {request["batch"]}, precision: \
{request["precision"]}, log_every: 1, cache_features: false,
  learning_rate: {request["learning_rate"]}, schedule: {{kind: linear, warmup: 0.0}},
  checkpoints: {{every: 1000000}}}}
evaluate: {{samples: 0}}
"""


if __name__ == "__main__":
    take_steps(recipe_of, vlm_tune.sft, ())
