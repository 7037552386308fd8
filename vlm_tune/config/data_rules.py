"""Checks for settings of a recipe's data that contradict each other, its model or its training."""

from __future__ import annotations

from typing import Any

from vlm_tune.config.yaml_source import Path, value_at


def data_contradictions(raw: Any) -> list[tuple[Path, str]]:
    """Returns faults of the data section, as (path, message); `raw` holds unchecked values."""
    data = value_at(raw, "data") if isinstance(value_at(raw, "data"), dict) else {}
    contrastive = value_at(raw, "objective", "kind") == "contrastive"
    of_objective = _contrastive_contradictions if contrastive else _group_contradictions
    return [
        *_augment_contradictions(raw, data),
        *of_objective(raw, data),
        *_share_contradictions(data),
        *_selection_contradictions(data),
        *(_streaming_contradictions(raw, data) if data.get("streaming") is True else []),
    ]


def _augment_contradictions(raw: Any, data: dict[str, Any]) -> list[tuple[Path, str]]:
    """Returns augmentations that would move the tiles of one image apart."""
    faults: list[tuple[Path, str]] = []
    augment = data.get("augment")
    if value_at(raw, "model", "tower", "tiles") and isinstance(augment, dict):
        still = {
            "crop": 1,
            "flip": 0,
            "transpose": 0,
            "shift": 0,
            "rotation": 0,
            "rand_augment": None,
        }
        moved = [key for key, value in still.items() if augment.get(key) not in (None, value)]
        message = (
            "tiles are cut first, so each would move by itself; with model.tower.tiles images take "
            "colour, hue and noise"
        )
        faults += [(("data", "augment", key), message) for key in moved]
    return faults


def _group_contradictions(raw: Any, data: dict[str, Any]) -> list[tuple[Path, str]]:
    """Returns the fault of grouping by image where each question must read the image anew."""
    faults: list[tuple[Path, str]] = []
    reads = (
        value_at(raw, "model", "connector", "text") is True
        or value_at(raw, "model", "connector", "kind") == "fusion"
    )
    if data.get("group") == "image" and reads and value_at(raw, "model", "llm", "kind") == "causal":
        faults.append(
            (
                ("data", "group"),
                "a text-conditioned connector reads an image once a question, so it needs "
                "data.group: none",
            )
        )
    return faults


def _contrastive_contradictions(raw: Any, data: dict[str, Any]) -> list[tuple[Path, str]]:
    """Returns settings that a contrastive objective can't train on: it compares single images."""
    faults: list[tuple[Path, str]] = []
    if data.get("group") in (None, "none"):
        faults.append(
            (
                ("data", "group"),
                "a contrastive objective compares images, so it needs data.group: image",
            )
        )
    if value_at(raw, "model", "tower", "tiles"):
        faults.append(
            (
                ("model", "tower", "tiles"),
                "a contrastive objective takes one image a row, so no tiles",
            )
        )
    if data.get("packing"):
        faults.append(
            (
                ("data", "packing"),
                "a contrastive objective takes one image a row, so no packing",
            )
        )
    return faults


def _share_contradictions(data: dict[str, Any]) -> list[tuple[Path, str]]:
    """Returns faults of the sources' shares of an epoch."""
    faults: list[tuple[Path, str]] = []
    for part in ("train", "validation", "test"):
        for index, source in enumerate(data[part] if isinstance(data.get(part), list) else []):
            share_keys = [
                key
                for key in ("weight", "count")
                if isinstance(source, dict) and source.get(key) is not None
            ]
            if share_keys and part != "train":
                faults.append(
                    (
                        ("data", part, index, share_keys[0]),
                        f"{share_keys[0]} divides an epoch of training; {part} reads every row",
                    )
                )
            elif len(share_keys) == 2:
                faults.append(
                    (("data", part, index, "count"), "give at most one of weight and count")
                )
    trained = data["train"] if isinstance(data.get("train"), list) else []
    weighted = any(isinstance(source, dict) and source.get("weight") for source in trained)
    if data.get("epoch_size") is not None and not weighted:
        faults.append(
            (
                ("data", "epoch_size"),
                "epoch_size is divided by the sources' weights, and no source has a weight",
            )
        )
    return faults


def _selection_contradictions(data: dict[str, Any]) -> list[tuple[Path, str]]:
    """Returns faults of the split, the cleaning rules and the shards."""
    faults: list[tuple[Path, str]] = []
    shares = [value_at(data, "split", part) for part in ("validation", "test")]
    if sum(share for share in shares if isinstance(share, int | float)) >= 1:
        faults.append((("data", "split"), "validation and test leave nothing to train on"))
    least = value_at(data, "clean", "min_chars")
    most = value_at(data, "clean", "max_chars")
    if isinstance(least, int) and isinstance(most, int) and least > most:
        faults.append(
            (("data", "clean", "max_chars"), f"max_chars {most} is under min_chars {least}")
        )
    if data.get("own_shards") is True and data.get("streaming") is not True:
        faults.append(
            (
                ("data", "own_shards"),
                "own_shards is of data.streaming: true; prepared rows are read by number",
            )
        )
    return faults


def _streaming_contradictions(raw: Any, data: dict[str, Any]) -> list[tuple[Path, str]]:
    """Returns settings that need rows in advance, which a stream does not have."""
    faults: list[tuple[Path, str]] = []
    if value_at(raw, "train", "steps") is None:
        faults.append((("train",), "a stream has no epochs: give train.steps"))
    if data.get("group") == "image":
        faults.append(
            (
                ("data", "group"),
                "a stream can't bring the rows of an image together; prepare (streaming: false) or "
                "group: none",
            )
        )
    clean = data.get("clean")
    cleaned = clean if isinstance(clean, dict) else {}
    need_all_rows = {
        "split": data.get("split"),
        "clean": any(value not in (None, [], "keep") for value in cleaned.values()),
    }
    for key, setting in {**need_all_rows, "epoch_size": data.get("epoch_size")}.items():
        if setting:
            faults.append(
                (("data", key), f"{key} needs all rows at hand; prepare them (streaming: false)")
            )
    for key in ("batch_tokens", "loader_workers"):
        if value_at(raw, "train", key) not in (None, 0, "auto"):
            faults.append((("train", key), f"{key} needs prepared rows (data.streaming: false)"))
    return faults
