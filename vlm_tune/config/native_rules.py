"""Checks for settings of a recipe that a model of `kind: native` does not take, with the reasons.

Its own forward pass computes image features, so what needs other ones is refused. Whether samples
can be joined in a row differs by model: the language model knows it (`LanguageModel.unjoined`).
"""

from __future__ import annotations

from typing import Any

from vlm_tune.config.faults import Fault, broken
from vlm_tune.config.native import OWN_TEMPLATE
from vlm_tune.config.tune import written_rules
from vlm_tune.config.yaml_source import value_at

TUNED = ("frozen", "full", "norms", "biases", "lora")
"""Kinds of tuning that need no knowledge of the order of a model's blocks."""

FEATURES_NEEDED = ("contrastive", "matching")
"""Objectives that compare image features, or show a row with another row's."""


def native_contradictions(raw: Any) -> list[Fault]:
    """Returns settings that a native model does not take; `raw` holds unchecked values."""
    if value_at(raw, "model", "kind") != "native":
        return broken(
            (
                value_at(raw, "data", "template") == OWN_TEMPLATE,
                ("data", "template"),
                f"template: {OWN_TEMPLATE} needs model.kind: native; name a chat format",
            )
        )
    return [*_data_faults(raw), *_training_faults(raw), *_tune_faults(raw)]


def _data_faults(raw: Any) -> list[Fault]:
    return broken(
        (
            value_at(raw, "data", "augment"),
            ("data", "augment"),
            "a native model's own processor prepares images, and augments none: drop augment",
        ),
        _crossed_bounds(raw, "min_pixels", "max_pixels"),
        _crossed_bounds(raw, "video_min_pixels", "video_max_pixels"),
    )


def _crossed_bounds(raw: Any, lower: str, upper: str) -> tuple[bool, tuple[str, str], str]:
    """Whether one key of the model is over another, where that is, and why it is a fault."""
    least = value_at(raw, "model", lower)
    most = value_at(raw, "model", upper)
    crossed = isinstance(least, int) and isinstance(most, int) and least > most
    return crossed, ("model", upper), f"{upper} {most} is under {lower} {least}"


def _training_faults(raw: Any) -> list[Fault]:
    kind = value_at(raw, "objective", "kind")
    return broken(
        (
            value_at(raw, "train", "cache_features") is True,
            ("train", "cache_features"),
            "a native model's own forward pass takes images, and no features of a cache: set "
            "cache_features: false",
        ),
        (
            kind in FEATURES_NEEDED,
            ("objective", "kind"),
            f"a native model is not trained by objective.kind: {kind}, which needs image features "
            "outside of its forward pass",
        ),
        (
            kind == "span_corruption",
            ("objective", "kind"),
            "span_corruption needs an encoder-decoder (T5), and a native model is run as a decoder",
        ),
        (
            value_at(raw, "objective", "image_noise"),
            ("objective", "image_noise"),
            "a native model's own forward pass takes images, and no noise on their tokens",
        ),
    )


def _tune_faults(raw: Any) -> list[Fault]:
    faults: list[Fault] = []
    for index, rule in enumerate(written_rules(raw)):
        how = rule.get("how")
        faults += broken(
            (
                isinstance(how, str) and how not in TUNED,
                ("tune", index, "how"),
                f"how: {how} is not for a native model; expected one of {', '.join(TUNED)}",
            ),
            (
                rule.get("layer_decay") is not None,
                ("tune", index, "layer_decay"),
                "layer_decay is not for a native model: give rules for its layers a learning_rate",
            ),
            (
                rule.get("sharing") in ("soft", "layered"),
                ("tune", index, "sharing"),
                "tasks of a native model share one adapter: leave sharing out",
            ),
        )
    return faults
