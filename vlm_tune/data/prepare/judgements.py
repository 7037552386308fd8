"""Liked and disliked answers of a part, of which KTO needs both."""

from __future__ import annotations

from vlm_tune.config.objectives import AnyObjective, Kto, parts_of
from vlm_tune.data.prepare.dataset import Prepared
from vlm_tune.data.types import CHOSEN, REJECTED

LARGEST = 4 / 3
"""Largest ratio of the weights of all liked answers and all disliked ones; the smallest is 1."""


def judgement_notes(objective: AnyObjective, prepared: Prepared) -> list[str]:
    """The reason why KTO learns little from a part's judgements, if there is one.

    The bounds are those of the paper's equation 8 (arXiv 2402.01306), by which TRL warns too.
    """
    config = next((each for each in parts_of(objective) if isinstance(each, Kto)), None)
    if config is None:
        return []
    counts = prepared.store.judged_answers
    liked, disliked = int(counts[CHOSEN]), int(counts[REJECTED])
    if liked == disliked:
        return []
    if not (liked and disliked):
        one, label = ("liked", "false") if liked else ("disliked", "true")
        text = (
            f"all {liked + disliked:,} answers are {one}: kto learns by telling liked answers from "
            f"disliked ones; add rows with label: {label}"
        )
        return [text]
    weights = config.desirable_weight * liked, config.undesirable_weight * disliked
    # As TRL, which rounds its bounds to two places.
    if 0.99 <= weights[0] / weights[1] <= LARGEST + 0.01:
        return []
    least, other = weights[1] / liked, weights[0] / disliked
    text = (
        f"{liked:,} answers are liked and {disliked:,} disliked, which the weights do not balance: "
        f"set desirable_weight to {least:.3g} to {LARGEST * least:.3g}, or undesirable_weight to "
        f"{other / LARGEST:.3g} to {other:.3g}"
    )
    return [text]
