"""The projectors by the models that they hold, and why other models can't be written."""

from __future__ import annotations

from typing import Any

from vlm_tune.config.towers import Tower
from vlm_tune.exporting.gguf.gemma3_projector import GEMMA3
from vlm_tune.exporting.gguf.idefics3_projector import IDEFICS3
from vlm_tune.exporting.gguf.internvl_projector import INTERNVL
from vlm_tune.exporting.gguf.mlp_projector import MLP
from vlm_tune.exporting.gguf.pixtral_projector import PIXTRAL
from vlm_tune.exporting.gguf.projector import Projector
from vlm_tune.model.vlm import VisionLanguageConfig

PROJECTORS: dict[str, Projector] = {
    "whole": MLP,
    "idefics3": IDEFICS3,
    "gemma3": GEMMA3,
    "internvl": INTERNVL,
    "pixtral": PIXTRAL,
}
"""The projectors by the kind of a model's images, see `image_kind`."""

ROW_ENDS = "llama.cpp joins the tiles of an image without the learned tokens for rows' ends"
REFUSED = {
    "llava_next": ROW_ENDS,
    "llava_onevision": ROW_ENDS,
}
"""Why a model can't be written, by the kind of its images.

As of the llama.cpp in llama-cpp-python 0.3.36 (`tools/mtmd/models`).
"""


def image_kind(config: VisionLanguageConfig) -> str:
    """How a model sees images: `model.tower.split.kind`, "pixtral" by its tower, or "whole"."""
    tower = config.model.tower
    split = tower.split if isinstance(tower, Tower) else None
    if split is not None:
        return split.kind
    shaped = config.tower_rebuild.get("vision_config", {}).get("model_type") == "pixtral"
    return "pixtral" if shaped else "whole"


def projector_of(config: VisionLanguageConfig) -> Projector:
    """The projector of a model that has none of the reasons of `mmproj_reasons`."""
    return PROJECTORS[image_kind(config)]


def mmproj_reasons(config: VisionLanguageConfig, text: Any) -> list[str]:
    """The reasons why llama.cpp can't hold a tower or a connector, from configs alone.

    `text` is transformers' config of the LLM, None for an encoder-decoder.
    """
    kind = image_kind(config)
    return [REFUSED[kind]] if kind in REFUSED else PROJECTORS[kind].reasons(config, text)
