"""Recipes over tiny checkpoints of one family of each kind of attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.gemma_samples import save_gemma3, save_paligemma
from tests.helpers.native_models import save_native, with_native
from tests.helpers.tiled_samples import save_internvl
from tests.helpers.vlm_samples import with_pretrained

SAVED: dict[str, Callable[[Path], Any]] = {
    "internvl": save_internvl,
    "gemma3": save_gemma3,
    "paligemma": lambda folder: save_paligemma(folder, "gemma2"),
    "qwen3_vl": lambda folder: save_native(folder, "qwen3_vl"),
}
"""Causal; images that see themselves both ways, with windows; prompts that do; native, M-RoPE."""
NATIVE = ("qwen3_vl",)


def save_families(folder: Path) -> None:
    """Writes a checkpoint of each family into a folder of its name."""
    for name, save in SAVED.items():
        save(folder / name)


def over_family(text: str, folder: Path, name: str) -> str:
    """A tiny recipe's text that starts from a family's checkpoint of `save_families`."""
    if name in NATIVE:
        return with_native(text, folder / name)
    return with_pretrained(text, folder / name, name)
