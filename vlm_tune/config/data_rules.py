"""Checks for settings of a recipe's data that contradict each other, its model or its training."""

from __future__ import annotations

from typing import Any

from vlm_tune.config.faults import Fault, broken
from vlm_tune.config.yaml_source import value_at

UNMOVED = {
    "crop": 1,
    "zoom_out": 1,
    "flip": 0,
    "transpose": 0,
    "shift": 0,
    "rotation": 0,
    "rand_augment": None,
}
"""Augmentations that move an image's content, with the values by which they do not."""


CUT = ("tiles", "split")
"""Settings of a tower that cut an image into several."""


def data_contradictions(raw: Any) -> list[Fault]:
    """Returns faults of the data section; `raw` holds unchecked values."""
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


def _augment_contradictions(raw: Any, data: dict[str, Any]) -> list[Fault]:
    """Returns augmentations that would move the tiles of one image apart."""
    augment = data.get("augment")
    key = next((key for key in CUT if value_at(raw, "model", "tower", key)), None)
    if key is None or not isinstance(augment, dict):
        return []
    message = (
        f"tiles are cut first, so each would move by itself; with model.tower.{key} images take "
        "colour, hue, grey and noise"
    )
    return [
        (("data", "augment", key), message)
        for key, still in UNMOVED.items()
        if augment.get(key) not in (None, still)
    ]


def _group_contradictions(raw: Any, data: dict[str, Any]) -> list[Fault]:
    """Returns the fault of grouping by image where each question must read the image anew."""
    reads = (
        value_at(raw, "model", "connector", "text") is True
        or value_at(raw, "model", "connector", "kind") == "fusion"
    )
    causal = value_at(raw, "model", "llm", "kind") == "causal"
    return broken(
        (
            data.get("group") == "image" and reads and causal,
            ("data", "group"),
            "a text-conditioned connector reads an image once a question, so it needs "
            "data.group: none",
        )
    )


def _contrastive_contradictions(raw: Any, data: dict[str, Any]) -> list[Fault]:
    """Returns settings that a contrastive objective can't train on: it compares single images."""
    return broken(
        (
            data.get("group") in (None, "none"),
            ("data", "group"),
            "a contrastive objective compares images, so it needs data.group: image",
        ),
        *(
            (
                value_at(raw, "model", "tower", key),
                ("model", "tower", key),
                "a contrastive objective takes one image a row, so no tiles",
            )
            for key in CUT
        ),
        (
            data.get("packing"),
            ("data", "packing"),
            "a contrastive objective takes one image a row, so no packing",
        ),
    )


def _share_contradictions(data: dict[str, Any]) -> list[Fault]:
    """Returns faults of the sources' shares of an epoch."""
    faults: list[Fault] = []
    for part in ("train", "validation", "test"):
        for index, source in enumerate(data[part] if isinstance(data.get(part), list) else []):
            share_keys = [
                key
                for key in ("weight", "count")
                if isinstance(source, dict) and source.get(key) is not None
            ]
            if share_keys and part != "train":
                message = f"{share_keys[0]} divides an epoch of training; {part} reads every row"
                faults.append((("data", part, index, share_keys[0]), message))
            elif len(share_keys) == 2:
                message = "give at most one of weight and count"
                faults.append((("data", part, index, "count"), message))
    trained = data["train"] if isinstance(data.get("train"), list) else []
    weighted = any(isinstance(source, dict) and source.get("weight") for source in trained)
    return faults + broken(
        (
            data.get("epoch_size") is not None and not weighted,
            ("data", "epoch_size"),
            "epoch_size is divided by the sources' weights, and no source has a weight",
        )
    )


def _selection_contradictions(data: dict[str, Any]) -> list[Fault]:
    """Returns faults of the split, the cleaning rules and the shards."""
    shares = [value_at(data, "split", part) for part in ("validation", "test")]
    least = value_at(data, "clean", "min_chars")
    most = value_at(data, "clean", "max_chars")
    return broken(
        (
            sum(share for share in shares if isinstance(share, int | float)) >= 1,
            ("data", "split"),
            "validation and test leave nothing to train on",
        ),
        (
            isinstance(least, int) and isinstance(most, int) and least > most,
            ("data", "clean", "max_chars"),
            f"max_chars {most} is under min_chars {least}",
        ),
        (
            data.get("own_shards") is True and data.get("streaming") is not True,
            ("data", "own_shards"),
            "own_shards is of data.streaming: true; prepared rows are read by number",
        ),
    )


def _streaming_contradictions(raw: Any, data: dict[str, Any]) -> list[Fault]:
    """Returns settings that need rows in advance, which a stream does not have."""
    clean = data.get("clean")
    cleaned = clean if isinstance(clean, dict) else {}
    need_all_rows = {
        "split": data.get("split"),
        "clean": any(value not in (None, [], "keep") for value in cleaned.values()),
        "epoch_size": data.get("epoch_size"),
    }
    return broken(
        (
            value_at(raw, "train", "steps") is None,
            ("train",),
            "a stream has no epochs: give train.steps",
        ),
        (
            data.get("group") == "image",
            ("data", "group"),
            "a stream can't bring the rows of an image together; prepare (streaming: false) or "
            "group: none",
        ),
        *(
            (
                setting,
                ("data", key),
                f"{key} needs all rows at hand; prepare them (streaming: false)",
            )
            for key, setting in need_all_rows.items()
        ),
        *(
            (
                value_at(raw, "train", key) not in (None, 0, "auto"),
                ("train", key),
                f"{key} needs prepared rows (data.streaming: false)",
            )
            for key in ("batch_tokens", "loader_workers")
        ),
    )
