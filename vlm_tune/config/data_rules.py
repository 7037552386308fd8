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
        f"tiles are cut first, so each would move separately; with model.tower.{key} images "
        "take colour, hue, grey and noise"
    )
    return [
        (("data", "augment", key), message)
        for key, still in UNMOVED.items()
        if augment.get(key) not in (None, still)
    ]


def _group_contradictions(raw: Any, data: dict[str, Any]) -> list[Fault]:
    """Returns the fault of grouping by image where each question must read the image again."""
    reads = (
        value_at(raw, "model", "connector", "text") is True
        or value_at(raw, "model", "connector", "kind") == "fusion"
    )
    causal = value_at(raw, "model", "llm", "kind") == "causal"
    return broken(
        (
            data.get("group") == "image" and reads and causal,
            ("data", "group"),
            "a text-conditioned connector reads an image once per question, so it needs "
            "data.group: none",
        ),
        (
            data.get("group") == "image"
            and value_at(raw, "model", "llm", "bidirectional") == "prompt",
            ("data", "group"),
            "the tokens of an image see its question (model.llm.bidirectional: prompt), so "
            "questions share no prefix: set data.group: none",
        ),
    )


def _contrastive_contradictions(raw: Any, data: dict[str, Any]) -> list[Fault]:
    """Returns settings that a contrastive objective can't train on: it compares single images."""
    two_views = value_at(raw, "objective", "views") in TWO_VIEWS
    return _view_faults(raw, data) + broken(
        (
            data.get("group") in (None, "none"),
            ("data", "group"),
            "a contrastive objective compares images, so it needs data.group: image",
        ),
        *(
            (
                value_at(raw, "model", "tower", key),
                ("model", "tower", key),
                "a contrastive objective takes one image per row, so no tiles",
            )
            for key in CUT
        ),
        (
            data.get("packing"),
            ("data", "packing"),
            "a contrastive objective takes one image per row, so no packing",
        ),
        (
            weighs_losses(data),
            ("data", "train"),
            "a contrastive loss compares the rows of a micro-batch, so the sources' loss_weight "
            "must be equal",
        ),
        (
            (value_at(raw, "objective", "loss") in ("clip", "siglip") or two_views)
            and value_at(raw, "train", "batch_size") == 1,
            ("train", "batch_size"),
            "a contrastive objective compares the rows of a micro-batch, and one row has no "
            "negatives; take 2 or more (gradient_accumulation adds none)",
        ),
        (
            value_at(raw, "objective", "bias") is not None
            and value_at(raw, "objective", "loss") != "siglip",
            ("objective", "bias"),
            "bias needs loss: siglip",
        ),
    )


TWO_VIEWS = ("image_image", "both")
"""The `views` of a contrastive objective that read two augmentations of an image."""


def _view_faults(raw: Any, data: dict[str, Any]) -> list[Fault]:
    """Returns faults of a contrastive objective of two views of an image."""
    views = value_at(raw, "objective", "views")
    if views not in TWO_VIEWS:
        return []
    alone = views == "image_image"
    return broken(
        (
            not isinstance(data.get("augment"), dict),
            ("objective", "views"),
            f"views: {views} compares two augmentations of an image: set data.augment",
        ),
        (
            alone and value_at(raw, "objective", "loss") in ("clip", "siglip"),
            ("objective", "loss"),
            "loss compares images and captions, which views: image_image does not; leave it "
            "out, or use views: both",
        ),
        *(
            (
                alone and bool(data.get(part)),
                ("data", part),
                "views: image_image brings no words together, so there are no answers to score; "
                f"set data.{part}: [], or use views: both",
            )
            for part in ("validation", "test")
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
            if part != "train" and value_at(source, "loss_weight") is not None:
                message = f"loss_weight is for training; {part} is scored row by row"
                faults.append((("data", part, index, "loss_weight"), message))
            if part != "train" and value_at(source, "objective") is not None:
                message = f"a source of {part} names no objective: the first one scores all rows"
                faults.append((("data", part, index, "objective"), message))
    return faults + _mixture_contradictions(data)


def _mixture_contradictions(data: dict[str, Any]) -> list[Fault]:
    """Returns faults of shares by size beside shares by weight, and of an epoch without shares."""
    written = data["train"] if isinstance(data.get("train"), list) else []
    trained = [source if isinstance(source, dict) else {} for source in written]
    weighted = [index for index, source in enumerate(trained) if source.get("weight") is not None]
    mixes = data.get("mixture") is not None
    return broken(
        (
            data.get("epoch_size") is not None and not weighted and not mixes,
            ("data", "epoch_size"),
            "epoch_size is divided by the sources' weights or by data.mixture, and there are none",
        ),
        (
            mixes and trained and all(source.get("count") is not None for source in trained),
            ("data", "mixture"),
            "mixture gives shares to sources without a count, and every source has one",
        ),
        *(
            (
                mixes,
                ("data", "train", index, "weight"),
                "data.mixture gives shares by size; drop the sources' weights, or data.mixture",
            )
            for index in weighted
        ),
    )


def weighs_losses(data: dict[str, Any]) -> bool:
    """Whether the losses of the train sources' rows differ in weight."""
    written = data["train"] if isinstance(data.get("train"), list) else []
    weights = [value_at(source, "loss_weight") or 1 for source in written]
    return any(weight != weights[0] for weight in weights)


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
            "own_shards needs data.streaming: true; prepared rows are read by number",
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
        "mixture": data.get("mixture"),
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
        (
            data.get("own_shards") is True and weighs_losses(data),
            ("data", "own_shards"),
            "a micro-batch has rows of one loss_weight on all processes, and with own_shards each "
            "reads rows of its own; drop one of them",
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
