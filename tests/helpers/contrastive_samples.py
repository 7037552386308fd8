"""Images of distinct colors with captions, and tiny recipes that compare them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.helpers.tiny_models import parsed
from vlm_tune.config.recipe import Recipe

COLORS = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (30, 40, 220),
    "yellow": (230, 220, 40),
    "black": (10, 10, 10),
    "white": (245, 245, 245),
    "purple": (150, 30, 170),
    "cyan": (40, 220, 220),
}


def write_captions(folder: Path, name: str, seed: int) -> Path:
    """`name`.jsonl: an image of each color, with noise of its own, and its caption."""
    rng = np.random.default_rng(seed)
    rows = []
    for color, value in COLORS.items():
        noise = rng.integers(-20, 20, (32, 32, 3))
        pixels = (np.full((32, 32, 3), value) + noise).clip(0, 255).astype(np.uint8)
        image = f"{name}-{color}.png"
        Image.fromarray(pixels).save(folder / image)
        rows.append({"image": image, "caption": f"a {color} picture"})
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contrastive_recipe(
    tiny_recipe: Callable[..., str],
    folder: Path,
    loss: str,
    kind: str = "causal",
    output: str = "run",
    **changes: Any,
) -> Recipe:
    """A recipe that trains the connector and the LLM's embeddings on eight captions."""
    parts = {
        part: [{"kind": "file", "path": str(write_captions(folder, part, seed))}]
        for seed, part in enumerate(("train", "validation", "test"))
    }
    settings: dict[str, Any] = {
        "objective": {"kind": "contrastive", "loss": loss},
        "data__group": "image",
        "tune": [
            {"match": "tower.*", "how": "frozen"},
            {"match": "connector.*", "how": "full"},
            {"match": f"llm.{EMBEDDINGS[kind]}", "how": "full"},
            {"match": "*", "how": "frozen"},
        ],
        "evaluate__samples": 0,
    }
    settings |= {f"data__{part}": source for part, source in parts.items()}
    return parsed(tiny_recipe(kind, output=output), **(settings | changes))


def matching_recipe(
    tiny_recipe: Callable[..., str],
    folder: Path,
    kind: str = "causal",
    output: str = "run",
    *,
    objective: dict[str, Any] | None = None,
    **changes: Any,
) -> Recipe:
    """A recipe that trains all but the tower on whether eight captions match."""
    settings: dict[str, Any] = {
        "objective": {"kind": "matching", **(objective or {})},
        "evaluate__samples": 0,
    }
    for seed, part in enumerate(("train", "validation", "test")):
        path = write_captions(folder, part, seed)
        settings[f"data__{part}"] = [{"kind": "file", "path": str(path), "form": "match"}]
    return parsed(tiny_recipe(kind, output=output), **(settings | changes))


EMBEDDINGS = {"causal": "model.embed_tokens.*", "seq2seq": "shared.*"}
"""The names of the LLM's embeddings, by its kind."""
