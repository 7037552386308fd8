"""Our side of `benchmarks.preferences`: a training by `vlm_tune.dpo`, one step at a time.

Takes a request as a JSON argument, which `benchmarks.turns.Comparison.running` writes. After
a line of standard input it takes a step, and prints {"seconds", "loss", "logps/chosen",
"logps/rejected"}.
"""

from __future__ import annotations

from pathlib import Path

import vlm_tune
from benchmarks.our_steps import Request, lora_recipe, take_steps

OBJECTIVE = """
objective: {kind: dpo, loss_type: [sigmoid, sft], loss_weights: [1.0, 0.2], beta: 0.1,
  reference: adapter_off}
"""


def recipe_of(request: Request, output: Path) -> str:
    """The recipe of a request: what `benchmarks/peers/train_dpo.py` gives TRL."""
    return lora_recipe(request, output, objective=OBJECTIVE, form="preference")


if __name__ == "__main__":
    take_steps(recipe_of, vlm_tune.dpo, ("logps/chosen", "logps/rejected"))
