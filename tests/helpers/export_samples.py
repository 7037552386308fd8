"""Tiny models to export, and what plain transformers makes of the folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.helpers.tiny_models import (
    CLIP,
    LORA_TUNE,
    built,
    parsed,
    tuned_by,
    wake_adapters,
    with_tune,
)

OPEN_CLIP = "{layers: 3, width: 64, head_width: 32, patch_size: 16, image_size: 32}"


def photos(folder: Path) -> None:
    """Replaces the rows' images by ones with detail, of other sizes and aspects."""
    rng = np.random.default_rng(5)
    for path, (width, height) in zip(
        sorted(folder.glob("*.png")), ((53, 37), (41, 97), (64, 64), (90, 31)), strict=True
    ):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(path)


def saved_model(
    text: str, folder: Path, *, lora: bool = False, sharpen: float = 2.0
) -> tuple[Path, Any]:
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


def llava_text(
    make: Callable[..., str], connector: str = "{kind: mlp, depth: 2}", **options: Any
) -> str:
    return make("causal", **options).replace("{kind: mlp, norm: true}", connector)


def opened(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(
        folder
    ).eval(), AutoProcessor.from_pretrained(folder, backend="pil")


def vision(folder: Path, kind: str) -> str:
    """A saved tiny tower of transformers, by name."""
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    torch.manual_seed(1)
    model: Any = (
        CLIPVisionModel(CLIPVisionConfig(**CLIP))
        if kind == "clip"
        else SiglipVisionModel(SiglipVisionConfig(**CLIP))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    model.save_pretrained(folder / kind)
    return str(folder / kind)


def tower_text(tmp_path: Path, tower: str) -> str:
    kinds = {
        "open_clip": f"{{kind: open_clip, config: {OPEN_CLIP}, layer: -2}}",
        "open_clip class token, pad": (
            f"{{kind: open_clip, config: {OPEN_CLIP}, layer: -1, class_token: true, resize: pad}}"
        ),
        "clip": "{kind: transformers, name: NAME, layer: -2}",
        "clip class token": (
            "{kind: transformers, name: NAME, layer: -1, class_token: true, resize: squash}"
        ),
        "clip larger images": (
            "{kind: transformers, name: NAME, layer: -2, image_size: 64, resize: pad}"
        ),
        "siglip": "{kind: transformers, name: NAME, layer: -1, resize: squash}",
        "siglip larger images": "{kind: transformers, name: NAME, layer: -2, image_size: 48}",
    }
    text = kinds[tower]
    return text.replace("NAME", vision(tmp_path, tower.split()[0])) if "NAME" in text else text
