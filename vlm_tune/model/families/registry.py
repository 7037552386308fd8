"""The families of vision-language models by the model type of their checkpoints."""

from __future__ import annotations

from typing import Any

from vlm_tune.model.families.base import Family, Vlm
from vlm_tune.model.families.blip import BLIP2, INSTRUCTBLIP
from vlm_tune.model.families.gemma3 import GEMMA3
from vlm_tune.model.families.idefics3 import IDEFICS3, SMOLVLM
from vlm_tune.model.families.internvl import INTERNVL
from vlm_tune.model.families.llava import LLAVA, LLAVA_ORIGINAL, ORIGINAL_TYPES
from vlm_tune.model.families.llava_next import LLAVA_NEXT
from vlm_tune.model.families.llava_onevision import LLAVA_ONEVISION
from vlm_tune.model.families.mistral3 import MISTRAL3, PIXTRAL
from vlm_tune.model.families.paligemma import PALIGEMMA
from vlm_tune.model.hub import config_source

FAMILIES: dict[str, Family] = {
    "llava": LLAVA,
    "llava_next": LLAVA_NEXT,
    "llava_onevision": LLAVA_ONEVISION,
    "blip-2": BLIP2,
    "instructblip": INSTRUCTBLIP,
    "idefics3": IDEFICS3,
    "smolvlm": SMOLVLM,
    "internvl": INTERNVL,
    "gemma3": GEMMA3,
    "paligemma": PALIGEMMA,
    "mistral3": MISTRAL3,
    "pixtral": PIXTRAL,
}
"""The families by transformers' model type; a LLaVA's by that of its tower, where it has one."""


def family_names() -> str:
    """The names of the families, for messages."""
    *others, last = (family.name for family in FAMILIES.values())
    return f"{', '.join(others)} and {last}"


def stored_config(name: str) -> dict[str, Any] | None:
    """The config of a hub name or folder, None where it can't be read."""
    from transformers.configuration_utils import PretrainedConfig

    try:
        return PretrainedConfig.get_config_dict(config_source(name))[0]
    except (OSError, ValueError):
        return None


def find_vlm(name: str) -> Vlm | None:
    """The vision-language model of a hub name or folder; None if it is of no known family."""
    config = stored_config(name)
    return None if config is None else vlm_of(name, config)


def vlm_of(name: str, config: dict[str, Any]) -> Vlm | None:
    """The vision-language model of this name and config; None if it is of no known family."""
    model_type = config.get("model_type")
    if model_type in ORIGINAL_TYPES and "mm_vision_tower" in config:
        return Vlm(name, LLAVA_ORIGINAL, config)
    tower = (config.get("vision_config") or {}).get("model_type")
    named = tower if model_type == "llava" and tower in FAMILIES else model_type
    family = FAMILIES.get(str(named))
    return Vlm(name, family, config) if family and "vision_config" in config else None
