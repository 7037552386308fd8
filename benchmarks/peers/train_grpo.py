"""TRL's GRPOTrainer on the LLaVA-shaped model, one step at a time.

Takes a request as a JSON argument, which `benchmarks.turns.Comparison.running` writes. After a line
of standard input it takes a step, and prints {"seconds", "loss", "reward",
"completions/mean_length"}.
"""

from __future__ import annotations

from typing import Any

from probe import read_rows
from rewards import vowels
from trl import GRPOConfig, GRPOTrainer
from trl_steps import take_steps

GROUP = 8
"""Completions of a prompt."""


def prompts(request: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows without their answers."""
    return [{"prompt": row["messages"][:1], "images": row["images"]} for row in read_rows(request)]


def options(request: dict[str, Any]) -> dict[str, Any]:
    """Arguments of GRPOConfig.

    All completions of a step are sampled at once, and trained in micro-batches.
    """
    return {
        "num_generations": GROUP,
        "max_completion_length": request["length"],
        "per_device_train_batch_size": request["micro_batch"],
        "gradient_accumulation_steps": request["batch"] * GROUP // request["micro_batch"],
    }


if __name__ == "__main__":
    figures = ("loss", "reward", "completions/mean_length")
    take_steps(GRPOTrainer, GRPOConfig, prompts, options, figures, reward_funcs=vowels)
