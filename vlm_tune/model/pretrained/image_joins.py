"""How a processor of transformers joins images and tells their tokens, found by trying it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from vlm_tune.data.images.native import TYPES, joined_inputs
from vlm_tune.data.types import Join, NativeInputs
from vlm_tune.errors import ModelError


def image_joins(alone: Sequence[NativeInputs], together: NativeInputs) -> tuple[Join, ...]:
    """The inputs that are not simply put one behind the other, and how they are joined.

    Args:
        alone: the inputs of each of several images by itself.
        together: those of all of them.
    """
    joins = []
    for name in together:
        parts = [one[name] for one in alone if name in one]
        dimension = _dimension(parts, together[name])
        counted, dimensions = _counted(name, alone, together) if dimension == 0 else ("", 0)
        if dimension or counted:
            joins.append(Join(name, dimension, counted, dimensions))
    return tuple(joins)


def _dimension(parts: Sequence[torch.Tensor], whole: torch.Tensor) -> int:
    """The first dimension in which the whole is as long as its parts together; else 0."""
    if any(part.dim() != whole.dim() for part in parts):
        return 0
    sums = [sum(part.shape[place] for part in parts) for place in range(whole.dim())]
    return next((place for place, size in enumerate(whole.shape) if size == sums[place]), 0)


def _counted(name: str, alone: Sequence[NativeInputs], together: NativeInputs) -> tuple[str, int]:
    """The input whose places another one counts on from image to image, and in how many dimensions.

    An empty name if the whole does not differ from its parts by such a number.
    """
    first, second = (one.get(name) for one in alone[:2])
    if first is None or second is None or second.is_floating_point():
        return "", 0
    part = together[name][len(first) : len(first) + len(second)]
    if part.shape != second.shape:
        return "", 0
    moved = (part - second)[second >= 0].unique().tolist()
    if len(moved) != 1 or moved[0] <= 0:
        return "", 0
    for other, tensor in alone[0].items():
        for dimensions in range(1, tensor.dim() + 1):
            if other != name and math.prod(tensor.shape[:dimensions]) == moved[0]:
                return other, dimensions
    return "", 0


def is_joined(alone: Sequence[NativeInputs], joins: Sequence[Join], together: NativeInputs) -> bool:
    """Whether the tensors of images by themselves, joined, are those of all together."""
    joined = joined_inputs(alone, joins)
    return joined.keys() == together.keys() and all(
        value.shape == together[name].shape and bool((value == together[name]).all())
        for name, value in joined.items()
    )


def token_types(prepared: Any) -> dict[str, dict[int, int]]:
    """The type of each token id, by the names of the arguments that tell kinds of tokens apart.

    Raises `ModelError` for an id of several types.
    """
    ids = prepared["input_ids"][0].tolist()
    types: dict[str, dict[int, int]] = {}
    for name in (name for name in TYPES if name in prepared):
        pairs = set(zip(ids, prepared[name][0].tolist(), strict=True))
        types[name] = {token: kind for token, kind in pairs if kind}
        if len(dict(pairs)) != len(pairs):
            raise ModelError(
                f"this model's processor gives a token {name} by more than its id, so it can't be "
                "trained here"
            )
    return types
