"""The learning rate's share of its full value, step by step."""

from __future__ import annotations

import math

from vlm_tune.config.train import Schedule


def schedule_factor(schedule: Schedule, step: float, total: float) -> float:
    """The share of the full learning rate at optimizer step `step` of `total`, both from 1."""
    warm = round(schedule.warmup * total)
    if step <= warm:
        return step / warm
    if schedule.kind == "constant":
        return 1.0
    done = (step - warm - 1) / max(total - warm, 1)
    return 0.5 * (1 + math.cos(math.pi * done)) if schedule.kind == "cosine" else 1 - done
