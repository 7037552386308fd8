"""A step of GRPO beside one of TRL's GRPOTrainer, in groups of eight on the same questions.

Run: python -m benchmarks.rewards [--json FILE]

A step samples eight completions of 16 tokens of each question, rewards them and takes one update.
The model is that of `benchmarks.preferences`, a ViT-B/16 tower (196 tokens an image) and
SmolLM2-135M; tower and connector have random weights, and both sides run the tower in each step.
Draws differ, so the losses of the sides are not compared here: `tests/parity/test_parity_policy.py`
compares them on the same completions. Here the bench ends if one side's completions are longer than
the other's. Then the settings of `SIDES` are tried in short runs, key by key, and the best ones
take steps in turns, with two questions an image and with one.

TRL samples all completions of a step at once and trains them in micro-batches, as memory does not
hold all.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from benchmarks import material
from benchmarks.peers import SCRIPTS
from benchmarks.turns import Comparison, Sides, compare_layouts, options_of

LAYOUTS = (2, 1)
"""Questions an image."""

LENGTH = (16,)
"""The maximum tokens of a completion, hardly any of which ends before."""

SIDES = Sides(
    commands={
        "ours": [sys.executable, "-m", "benchmarks.rewards_ours"],
        "trl": [sys.executable, str(SCRIPTS / "train_grpo.py")],
    },
    tried={
        "ours": {"length": LENGTH, "precision": ("fp32", "bf16")},
        "trl": {
            "length": LENGTH,
            "precision": ("fp32", "bf16", "bf16_weights"),
            "attention": ("sdpa",),
            "micro_batch": (8,),
        },
    },
    rows={"ours": "single", "trl": "single"},
    unit="prompts",
    write_model=partial(material.write_llava, image_tokens=196),
    write_rows=material.write_rows,
)
"""TRL's bf16 is autocast over fp32 weights; or its weights are bf16.

In bf16 its eager attention is the slower one: `benchmarks.preferences` tries both.
"""

TOLERANCE = 0.3
"""Relative difference of the mean lengths of the two sides' few first completions."""


def start(comparison: Comparison) -> dict[str, Any]:
    """The figures of the first step of both sides in fp32.

    Raises:
        SystemExit: the lengths of their completions differ by more than `TOLERANCE`.
    """
    figures = comparison.first_figures(comparison.layout(2, 2, steps=1))
    ours, theirs = (figures[name]["completions/mean_length"] for name in ("ours", "trl"))
    if abs(ours - theirs) > TOLERANCE * theirs:
        raise SystemExit(f"the sides write completions of other lengths: {figures}")
    return figures


def main() -> None:
    """Compares the steps of both sides."""
    compare_layouts(options_of(__doc__, LAYOUTS, number=2), SIDES, start)


if __name__ == "__main__":
    main()
