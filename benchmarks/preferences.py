"""A step of DPO beside one of TRL's DPOTrainer, on the same pairs of answers.

Run: python -m benchmarks.preferences [--json FILE]

The model has a ViT-B/16 tower (196 tokens an image) and SmolLM2-135M; tower and connector have
random weights. First both sides compute the loss of the same pairs from the same weights in fp32,
and the bench ends if they differ. Then the settings of `SIDES` are tried in short runs, key by
key, and the best ones take steps in turns, with ten pairs an image and with one. Steps begin with
reading the rows, and both sides run the tower in each step. The reference is the model without its
adapter.

With images, TRL disables batches without padding and refuses to compute the reference's
log-probabilities beforehand. Its gradient checkpointing is off, since it only computes more.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from benchmarks import material
from benchmarks.peers import SCRIPTS
from benchmarks.turns import Comparison, Sides, compare_layouts, options_of

LAYOUTS = (10, 1)
"""Pairs an image."""

SIDES = Sides(
    commands={
        "ours": [sys.executable, "-m", "benchmarks.preferences_ours"],
        "trl": [sys.executable, str(SCRIPTS / "train_dpo.py")],
    },
    tried={
        "ours": {"precision": ("fp32", "bf16")},
        "trl": {"precision": ("fp32", "bf16", "bf16_weights"), "attention": ("sdpa", "eager")},
    },
    rows={"ours": "preferences", "trl": "preferences"},
    unit="pairs",
    write_model=partial(material.write_llava, image_tokens=196),
    write_rows=material.write_preferences,
)
"""TRL's bf16 is autocast over fp32 weights; or its weights are bf16."""

FIGURES = ("loss", "logps/chosen", "logps/rejected")
TOLERANCE = 1e-3
"""Relative difference of the figures of the two sides at the start, in fp32."""


def start(comparison: Comparison) -> dict[str, Any]:
    """The figures of our first step in fp32.

    Raises:
        SystemExit: they differ from TRL's on the same pairs by more than `TOLERANCE`.
    """
    figures = comparison.first_figures(comparison.layout(2, 4, steps=1))
    for figure in FIGURES:
        ours, theirs = figures["ours"][figure], figures["trl"][figure]
        if abs(ours - theirs) > TOLERANCE * abs(theirs):
            raise SystemExit(f"the sides differ in {figure} at the start: {figures}")
    return figures["ours"]


def main() -> None:
    """Compares the steps of both sides."""
    compare_layouts(options_of(__doc__, LAYOUTS, number=10), SIDES, start)


if __name__ == "__main__":
    main()
