"""Bounds of the pixels of an image, which the image processors of some native models take."""

from __future__ import annotations

from typing import Literal

from vlm_tune.model.pretrained.native import takes_pixel_bounds
from vlm_tune.recipe_writer.converting.conversion import Conversion


def set_pixels(
    conversion: Conversion,
    bound: Literal["min_pixels", "max_pixels"],
    *keys: str,
    default: int | None = None,
) -> None:
    """Sets the least or most pixels of an image of a native model.

    Other models read images of one size: the keys are left for the reasons of the framework.

    Args:
        conversion: the configuration on its way, with its model set.
        bound: which of both.
        keys: the framework's keys; of two, both apply.
        default: the framework's default; the checkpoint's own if None.
    """
    if not conversion.native:
        return
    arguments = conversion.arguments
    model_type = conversion.model_type
    bounded = model_type is not None and takes_pixel_bounds(model_type)
    given = {key: pixels for key in keys if (pixels := arguments.count(key)) is not None}
    if not bounded:
        kind = f"a {model_type}" if model_type else "this model"
        reason = f"the image processor of {kind} is not known to take bounds of pixels"
        for key, pixels in given.items():
            arguments.refuse(key, pixels, reason)
    elif given:
        pixels = max(given.values()) if bound == "min_pixels" else min(given.values())
        conversion.set(f"model.{bound}", pixels, " and ".join(given))
    elif default is not None:
        conversion.set_or_default(f"model.{bound}", None, default, keys[0])
