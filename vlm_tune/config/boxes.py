"""The recipe's `model.boxes`: how a model reads and writes boxes and points."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vlm_tune.config.base import Config


class Boxes(Config):
    """How the model reads and writes boxes and points: in the frame that the tower sees."""

    unit: Literal["pixels", "norm1000", "norm1", "loc"] = Field(
        default="norm1000",
        description="pixels of the image as resized for the tower; 0 to 1000; 0 to 1; or "
        "PaliGemma's tokens <loc0000> to <loc1023>, y before x",
    )
    style: Literal["brackets", "parentheses"] = Field(
        default="brackets", description="[x1, y1, x2, y2], or (x1,y1),(x2,y2); not with unit: loc"
    )
    decimals: Annotated[int, Field(ge=1, le=6)] = Field(
        default=3, description="decimals of a number, with unit: norm1"
    )
