"""TRL's DPOTrainer on the LLaVA-shaped model, one step at a time.

Takes a request as a JSON argument, which `benchmarks.turns.Comparison.running` writes. After
a line of standard input it takes a step, and prints {"seconds", "loss", "logps/chosen",
"logps/rejected"}.
"""

from __future__ import annotations

from typing import Any

from probe import read_rows
from trl import DPOConfig, DPOTrainer
from trl_steps import take_steps


def options(request: dict[str, Any]) -> dict[str, Any]:
    """Arguments of DPOConfig."""
    return {
        "per_device_train_batch_size": request["batch"],
        "loss_type": ["sigmoid", "sft"],
        "loss_weights": [1.0, 0.2],
        "beta": 0.1,
        "max_length": None,
    }


if __name__ == "__main__":
    figures = ("loss", "logps/chosen", "logps/rejected")
    take_steps(DPOTrainer, DPOConfig, read_rows, options, figures)
