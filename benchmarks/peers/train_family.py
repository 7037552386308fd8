"""TRL's SFTTrainer on a published family's model, one step at a time.

Takes a request as a JSON argument, which `benchmarks.turns.Comparison.running` writes. After a line
of standard input it takes a step, and prints {"seconds", "loss"}.
"""

from __future__ import annotations

from typing import Any

from train_trl import rows_of
from trl import SFTConfig, SFTTrainer
from trl_steps import take_steps


def options(request: dict[str, Any]) -> dict[str, Any]:
    """Arguments of SFTConfig."""
    return {
        "per_device_train_batch_size": request["batch"] // request["accumulated"],
        "gradient_accumulation_steps": request["accumulated"],
        "assistant_only_loss": request["rows"] == "multi",
        "max_length": None,
    }


if __name__ == "__main__":
    take_steps(SFTTrainer, SFTConfig, rows_of, options, ("loss",))
