"""How a processor of transformers joins the inputs of several images, found by trying it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from vlm_tune.data.types import Join, NativeInputs


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
