"""A step of tuning a published family beside one of TRL's SFTTrainer, on the same questions.

Run: python -m benchmarks.families [--json FILE]

The model has the shape of SmolVLM-256M, saved as transformers saves it: a SigLIP-B/16 tower of
512 x 512 pixels, a pixel shuffle to 64 tokens, and SmolLM2-135M. Tower and connector have random
weights. An image is one frame: the processor's longest edge is 512, its default of 2,048 would make
17 frames of each of easy-VQA's 64 x 64 images. Both sides open the same folder, ours by
`model.pretrained`, and train LoRA on the LLM.

First both sides compute the loss of the same rows from the same weights in fp32, and the bench ends
if they differ. Then the settings of `SIDES` are tried in short runs, key by key, and the best ones
take steps in turns, with ten questions an image and with one. Steps begin with reading the rows,
and both sides run the tower in each step: ours caches no features, as a single epoch would have it.

TRL trains the same rows, one question each; `trl_turns` trains an image's questions as the turns of
one conversation, where later questions see the answers before: another loss, at which the image is
seen once. With images TRL refuses packing and batches without padding. Its gradient checkpointing
is off, since it only computes more.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks import material
from benchmarks.peers import SCRIPTS
from benchmarks.turns import Comparison, Sides, compare_layouts, options_of

LAYOUTS = (10, 1)
"""Questions an image."""

TRL = [sys.executable, str(SCRIPTS / "train_family.py")]

PRECISIONS = ("fp32", "bf16", "bf16_weights")
"""TRL's bf16 is autocast over fp32 weights; or its weights are bf16."""

ATTENTION = ("sdpa", "eager")

SIDES = Sides(
    commands={
        "ours": [sys.executable, "-m", "benchmarks.families_ours"],
        "trl": TRL,
        "trl_turns": TRL,
    },
    tried={
        "ours": {"precision": ("fp32", "bf16")},
        "trl": {"precision": PRECISIONS, "attention": ATTENTION, "accumulated": (1, 5)},
        "trl_turns": {"precision": PRECISIONS, "attention": ATTENTION, "accumulated": (1,)},
    },
    rows={"ours": "single", "trl": "single", "trl_turns": "multi"},
    unit="questions",
    write_model=material.write_smolvlm,
    write_rows=material.write_rows,
)
"""`accumulated` are the micro-batches of a step."""

TOLERANCE = 1e-3
"""Relative difference of the losses of the two sides at the start, in fp32."""


def start(comparison: Comparison) -> dict[str, Any]:
    """The loss of our first step in fp32.

    Raises:
        SystemExit: it differs from TRL's on the same rows by more than `TOLERANCE`.
    """
    figures = comparison.first_figures(comparison.layout(2, 4, steps=1))
    ours, theirs = (figures[name]["loss"] for name in ("ours", "trl"))
    if abs(ours - theirs) > TOLERANCE * abs(theirs):
        raise SystemExit(f"the sides differ in their loss at the start: {figures}")
    return figures


def main() -> None:
    """Compares the steps of the sides."""
    compare_layouts(options_of(__doc__, LAYOUTS, number=10), SIDES, start)


if __name__ == "__main__":
    main()
