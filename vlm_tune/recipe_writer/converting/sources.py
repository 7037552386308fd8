"""Data that another framework's configuration names, as sources of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm_tune.config.native import JOINED_TYPES
from vlm_tune.data.sources.registry import FORMATS, SHARDS
from vlm_tune.data.sources.stored_files import unpacked_name
from vlm_tune.paths import home, is_folder
from vlm_tune.recipe_writer.converting.conversion import Conversion
from vlm_tune.recipe_writer.find_data import file_source, is_there


def source_of(name: str) -> dict[str, Any]:
    """A source for a file, a saved data set, or a data set of the hub."""
    if name.endswith(SHARDS) or unpacked_name(Path(name)).suffix.lower() in FORMATS:
        return file_source(name)
    return {"kind": "dataset", "name": name}


def set_sources(conversion: Conversion, part: str, sources: list[dict[str, Any]], key: str) -> None:
    """Sets the sources of a part; without one, a place for the user's own."""
    if sources:
        conversion.set(f"data.{part}", sources, key)
    elif part == "train":
        placeholder = [{"kind": "file", "path": "data/train.jsonl"}]
        conversion.draft.set("data.train", placeholder, "the configuration names no data: name it")


def set_max_length(conversion: Conversion, key: str, default: int) -> None:
    """Sets the longest example, from a key or the framework's default."""
    length = conversion.arguments.count(key)
    conversion.set_or_default("data.max_length", length, default, key)


def set_packing(conversion: Conversion, packed: bool) -> None:
    """Sets packing where the configuration packs rows, if the model takes packed rows."""
    if packed and conversion.native and conversion.model_type not in JOINED_TYPES:
        reason = "the forward pass of this native model reads one sample a row"
        conversion.arguments.refuse("packing", True, reason)
    elif packed:
        conversion.set("data.packing", True, "packing")


def here(sources: list[dict[str, Any]]) -> bool:
    """Whether all files of the sources are on this machine."""
    return all(
        is_there(source["path"]) if "path" in source else is_folder(home(source["name"]))
        for source in sources
    )
