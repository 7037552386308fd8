"""Settings that contrastive and matching objectives can't train with are faults of the recipe."""

from __future__ import annotations

from typing import Any

import pytest

from vlm_tune.config.rules import contradictions

CLIP = {"kind": "contrastive", "loss": "clip"}
MATCHING = {"kind": "matching"}
IMAGES: dict[str, Any] = {"data": {"group": "image"}}
ALONE: dict[str, Any] = {"train": {"steps": 1, "batch_size": 1}}
TILES: dict[str, Any] = {"model": {"tower": {"tiles": 4}}}


@pytest.mark.parametrize(
    ("raw", "path", "message"),
    [
        ({"objective": CLIP, **IMAGES, **ALONE}, "train.batch_size", "no negatives"),
        ({"objective": {**CLIP, "bias": -5.0}, **IMAGES}, "objective.bias", "loss: siglip"),
        ({"objective": MATCHING, **IMAGES}, "data.group", "another row's image"),
        ({"objective": MATCHING, "data": {"packing": True}}, "data.packing", "by itself"),
        ({"objective": MATCHING, **ALONE}, "train.batch_size", "negatives"),
        ({"objective": MATCHING, **TILES}, "model.tower.tiles", "no tiles"),
    ],
)
def test_what_can_not_train_is_a_fault_at_its_key(
    raw: dict[str, Any], path: str, message: str
) -> None:
    ((where, fault),) = contradictions(raw)
    assert ".".join(map(str, where)) == path
    assert message in fault


@pytest.mark.parametrize(
    "raw",
    [
        {"objective": CLIP, **IMAGES},
        {"objective": {"kind": "contrastive", "loss": "siglip", "bias": -5.0}, **IMAGES},
        {"objective": {"kind": "contrastive"}, **IMAGES, **ALONE},
        {"objective": MATCHING, "evaluate": {"best": "exact_match"}},
    ],
)
def test_what_can_train_is_none(raw: dict[str, Any]) -> None:
    assert contradictions(raw) == []
