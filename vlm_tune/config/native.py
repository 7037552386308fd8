"""The recipe's `model` of `kind: native`: a model of transformers that is called as it is."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vlm_tune.config.base import Config, HomePath, PositiveInt
from vlm_tune.config.boxes import Boxes

OWN_TEMPLATE = "own"
"""The value of `data.template` that stands for a native checkpoint's own chat template."""

JOINED_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""transformers' types of native models whose samples can be joined in a row.

Their LLM takes a mask and positions on three axes as they are given, its layers attend and carry
nothing else from token to token, and images reach it at their own tokens alone (Qwen3-VL's in early
layers too). The layers of others carry a state from token to token (LFM2-VL's convolutions,
Qwen3.5's DeltaNet), or what they make of masks and positions has not been compared.
"""

SHARDED_TYPES = (
    *JOINED_TYPES,
    "lfm2_vl",
    "gemma4",
    "mistral3",
    "qwen3_5",
    "glm46v",
    "molmo2",
    "granite4_vision",
    "ovis2",
    "aya_vision",
    "cohere2_vision",
)
"""transformers' types of native models whose weights can be sharded (ZeRO-3, FSDP2).

Their forward pass runs the same modules in the same order whatever images a batch has, so that
every rank gathers the same weights at once. That of others runs modules image by image
(MiniCPM-V 4.6) or expert by expert, or has not been compared.
"""


class NativeLlmOptions(Config):
    """Options for the language model inside a native model."""

    quantize: Literal["nf4", "fp4", "int8"] | None = Field(
        default=None, description="load the frozen linear layers of the LLM's blocks in 4 or 8 bit"
    )
    attention: Literal["auto", "eager", "sdpa"] = Field(
        default="auto",
        description="how the model attends: `auto` chooses by the device; `eager` (matrix "
        "products) and `sdpa` (torch's fused attention) are transformers' own",
    )


class NativeModel(Config):
    """Any image-text-to-text model of transformers, with its own processor and forward pass.

    Qwen2.5-VL, Qwen3-VL, LFM2-VL and others; data.template: own is the checkpoint's own chat
    template. Branches and packing are for the Qwen-VL models.
    """

    kind: Literal["native"]
    pretrained: HomePath = Field(description="a hub name or a local folder")
    min_pixels: PositiveInt | None = Field(
        default=None,
        description="minimum pixels to which an image is resized; the checkpoint's by default",
    )
    max_pixels: PositiveInt | None = Field(
        default=None,
        description="maximum pixels to which an image is resized; the checkpoint's by default",
    )
    video_min_pixels: PositiveInt | None = Field(
        default=None,
        description="minimum pixels of a video: of each frame in Qwen2-VL and Qwen2.5-VL, of all "
        "frames together in Qwen3-VL; the checkpoint's by default",
    )
    video_max_pixels: PositiveInt | None = Field(
        default=None,
        description="maximum pixels of a video, counted in the same way; the checkpoint's by "
        "default",
    )
    llm: NativeLlmOptions = NativeLlmOptions()
    boxes: Boxes | None = Field(
        default=None,
        description=(
            "how the model reads and writes boxes and points; by default as its family does"
        ),
    )
