"""Our side of `benchmarks.families`: a training by `vlm_tune.sft`, one step at a time.

Takes a request as a JSON argument, which `benchmarks.turns.Comparison.running` writes. After a line
of standard input it takes a step, and prints {"seconds", "loss"}.
"""

from __future__ import annotations

import vlm_tune
from benchmarks.our_steps import lora_recipe, take_steps

if __name__ == "__main__":
    # The recipe of a request: what `benchmarks/peers/train_family.py` gives TRL.
    take_steps(lora_recipe, vlm_tune.sft, ())
