"""A model choice for few images: the tower learns them before the LLM does.

Measured by `python -m benchmarks.two_styles`; docs/your-own-data.md has the figures.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from vlm_tune.recipe_writer.look import Facts
from vlm_tune.recipe_writer.models import ModelChoice

FEW = 1000
"""Images up to which data is small."""
UNREPEATED = 0.2
"""Share of questions with an answer of one image only, from which nothing is held out of small
data for validation."""
ALIGN_BATCH = 40
ALIGN_SHOWN = 6000
ALIGN_EPOCHS = 60
ALIGN_EVALUATIONS = 4
"""Of the stage that aligns: images a step, images shown in all, most epochs, evaluations."""
NOISE = 1.5
"""The `image_noise` of the stage that follows."""
LEAST = 24
"""Images under which there is nothing to align."""


def is_small(facts: Facts) -> bool:
    """Whether there are few images with short answers, one image a row."""
    return facts.all_images <= FEW and facts.answers != "long" and facts.single_images


def unlearnable(facts: Facts) -> bool:
    """Whether held-out images of small data would often have answers that training never shows."""
    return is_small(facts) and facts.unrepeated >= UNREPEATED


def aligned_first(choice: ModelChoice, facts: Facts) -> ModelChoice:
    """The choice with a first stage in which the tower learns, where few images are named.

    That is for a small tower that was trained on photographs alone, and a decoder; other choices
    are returned as they are.
    """
    draft = choice.draft.copy()
    tower = draft.values.get("model.tower", {})
    small = is_small(facts) and facts.whole_image and facts.all_images >= LEAST
    if not (small and choice.causal and tower.get("kind") == "timm"):
        return choice
    draft.set(
        "model.tower",
        {**tower, "stages": [2, 3, 4], "grid": 4},
        f"{draft.reasons['model.tower'].partition(';')[0]}; deeper features too, since it learns "
        "these images",
    )
    draft.set(
        "model.connector",
        {"kind": "avg_pool", "grid": 1, "depth": 2, "norm": True},
        "questions are about the whole image, so it is one token: quick, and easy to align",
    )
    draft.set(
        "data.augment",
        _augment(facts),
        f"{facts.all_images:,} images are few: each is shown otherwise every time, so that the "
        "model learns what stays the same",
    )
    draft.rules = [_aligned(*rule) for rule in draft.rules]
    draft.set("stages", _stages(facts), REASON)
    return replace(choice, size="aligned", draft=draft, image_tokens=1)


def _aligned(rule: dict[str, Any], reason: str) -> tuple[dict[str, Any], str]:
    """A rule for the stage after the alignment, in which tower and connector stay as they are."""
    part = rule["match"].partition(".")[0]
    if part == "llm":
        return {**rule, "learning_rate": 1.0e-3}, f"{reason}; it learns a token of a new kind, fast"
    return {"match": rule["match"], "how": "frozen"}, f"the stage align has trained the {part}"


REASON = (
    "align: tower and connector learn to bring each image next to the words of its answers, and "
    "away from those of others. No step runs the LLM, so many epochs are cheap. The tower knows "
    "photographs: as it is, it tells drawings of another style apart badly\n"
    "instruct: the LLM learns to read the images, by the rules above, and with noise on them, so "
    "that it also reads images that lie between those it knows"
)
"""The comment of the stages."""


def _augment(facts: Facts) -> dict[str, Any]:
    moved = {"crop": 0.6, "rotation": 15}
    return moved if facts.colours else {**moved, "colour": 0.5, "hue": 0.03}


def _stages(facts: Facts) -> list[dict[str, Any]]:
    batch = min(ALIGN_BATCH, facts.all_images // 4)
    epochs = min(round(ALIGN_SHOWN / facts.all_images), ALIGN_EPOCHS)
    steps = epochs * math.ceil(facts.all_images / batch)
    align = {
        "name": "align",
        "objective": {"kind": "contrastive"},
        "data": {"group": "image"},
        "tune": [
            {"match": "llm.*", "how": "frozen"},
            {"match": "tower.*", "how": "full", "learning_rate": 1.0e-3},
            {"match": "*", "how": "full"},
        ],
        "train": {
            "epochs": epochs,
            "batch_size": batch,
            "gradient_accumulation": 1,
            "learning_rate": 2.0e-3,
            "precision": "fp32",
        },
        "evaluate": {"every": max(steps // ALIGN_EVALUATIONS, 1)},
    }
    noisy = {"kind": "language_modeling", "image_noise": NOISE}
    return [align, {"name": "instruct", "objective": noisy}]
