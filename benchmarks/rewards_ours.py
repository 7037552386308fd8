"""Our side of `benchmarks.rewards`: a training by `vlm_tune.grpo`, one step at a time.

Takes a request as a JSON argument, which `benchmarks.turns.Comparison.running` writes. After a line
of standard input it takes a step, and prints {"seconds", "loss", "reward",
"completions/mean_length"}.
"""

from __future__ import annotations

from pathlib import Path

import vlm_tune
from benchmarks.our_steps import Request, lora_recipe, take_steps


def recipe_of(request: Request, output: Path) -> str:
    """The recipe of a request: what `benchmarks/peers/train_grpo.py` gives TRL."""
    objective = (
        'objective: {kind: grpo, reward_funcs: ["benchmarks.peers.rewards:vowels"], '
        f"num_generations: 8, max_completion_length: {request['length']}}}"
    )
    return lora_recipe(request, output, objective=objective)


if __name__ == "__main__":
    take_steps(recipe_of, vlm_tune.grpo, ("reward", "completions/mean_length"))
