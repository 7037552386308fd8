"""Recipes of tiny models that train two tasks, with adapters of their own or one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers.tiny_models import LORA_TUNE, with_tune

SOFT = "sharing: soft, tie: 0.5"
LAYERED = "sharing: layered, shared_layers: 1"


def task_sources(rows: Path) -> list[dict[str, Any]]:
    """Sources of the tasks `color` and `other`: every second row of a file, and the rest."""
    lines = rows.read_text().splitlines(keepends=True)
    sources = []
    for place, task in enumerate(("color", "other")):
        path = rows.with_name(f"{task}.jsonl")
        path.write_text("".join(lines[place::2]))
        sources.append({"kind": "file", "path": str(path), "task_name": task})
    return sources


def with_sharing(text: str, sharing: str) -> str:
    """A tiny recipe's text with LoRA on the LLM, which tasks share in this way."""
    return with_tune(text, LORA_TUNE.replace("all-linear}", f"all-linear, {sharing}}}"))
