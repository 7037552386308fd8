"""Tiny models to export, and what plain transformers makes of the folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from small import LORA_TUNE, built, parsed, tuned_by, wake_adapters, with_tune


def photos(folder: Path) -> None:
    """Replaces the rows' images by ones with detail, of other sizes and aspects."""
    rng = np.random.default_rng(5)
    for path, (width, height) in zip(sorted(folder.glob("*.png")), ((53, 37), (41, 97), (64, 64), (90, 31)), strict=True):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(path)


def saved_model(text: str, folder: Path, *, lora: bool = False, sharpen: float = 2.0) -> tuple[Path, Any]:
    """A saved model whose answers depend on its images, beside its recipe."""
    folder.mkdir(parents=True)
    recipe = parsed(with_tune(text, LORA_TUNE) if lora else text)
    model = built(recipe)
    with torch.no_grad():
        for parameter in (*model.llm.parameters(), *model.connector.parameters()):
            parameter.mul_(sharpen)
    model.changed |= {"llm", "tower"}
    if lora:
        tuned_by(model, recipe)
        wake_adapters(model, 0.05)
    model.save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text(text)
    return folder, recipe


def llava_text(make: Callable[..., str], connector: str = "{kind: mlp, depth: 2}", **options: Any) -> str:
    return make("causal", **options).replace("{kind: mlp, norm: true}", connector)


def opened(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder, backend="pil")
