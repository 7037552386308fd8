"""How the families of vision-language models write boxes and points."""

from __future__ import annotations

from vlm_tune.config.boxes import Boxes

_THOUSAND = Boxes(unit="norm1000")
_PIXELS = Boxes(unit="pixels")
BOXES: dict[str, Boxes] = {
    **dict.fromkeys(
        (
            *("llava", "llava_llama", "llava_mistral", "llava_qwen"),
            *("llava_next", "llava_onevision"),
        ),
        Boxes(unit="norm1", decimals=2),
    ),
    "paligemma": Boxes(unit="loc"),
    "qwen2_vl": Boxes(unit="norm1000", style="parentheses"),
    "qwen2_5_vl": _PIXELS,
    "qwen3_vl": _THOUSAND,
    "qwen3_vl_moe": _THOUSAND,
    "internvl": _THOUSAND,
}
"""The conventions by transformers' model type, of models that were tuned with boxes."""


def family_boxes(model_type: str) -> Boxes:
    """The convention of a model type; 0 to 1000 where none is known."""
    return BOXES.get(model_type, _THOUSAND)
