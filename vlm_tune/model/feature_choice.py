"""Decides whether a frozen tower's features are cached: what that saves against what it costs."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from vlm_tune.config.recipe import Recipe
from vlm_tune.config.train import TrainSection
from vlm_tune.data.batching.mixture import epoch_counts
from vlm_tune.data.prepare.dataset import Prepared
from vlm_tune.data.types import Media
from vlm_tune.model.tower_pass import stored_dtype
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.model.weights import count_of
from vlm_tune.precision import DTYPES
from vlm_tune.resources import cache_folder, cache_limit

LEAST_SHARE = 0.03
"""Share of the steps' work that a cache must save at least on a GPU."""
LARGEST_SHARE = 0.5
"""Share of the free disk space that features may take."""
TOWER_RATE = 5e13
"""FLOP/s of a tower on a GPU, about a sixth of what recent ones reach with large products."""
WRITE_RATE = 1e9
"""Bytes a second that a disk writes, as NVMe ones do at least."""


@dataclass(frozen=True)
class Usage:
    """Images and tokens that the steps of a stage read, in all epochs together.

    Attributes:
        images: distinct images.
        views: how often an image is shown; the rows of one unit share theirs.
        tokens: input tokens of the LLM.
        patches: the mean patches of a distinct image, where images keep their shape.
    """

    images: int
    views: float
    tokens: float
    patches: float | None = None


@dataclass(frozen=True)
class Choice:
    """The decision to cache features or not, and its reason in words."""

    cached: bool
    reason: str

    def __str__(self) -> str:
        return f"{'cached' if self.cached else 'not cached'}: {self.reason}"


def trains_tower(model: VisionLanguageNetwork) -> bool:
    """Whether a model's rules train some of its tower, whose features then change."""
    return any(parameter.requires_grad for parameter in model.tower.parameters())


def stage_usage(prepared: Prepared, train: TrainSection, ranks: int) -> Usage:
    """The usage of prepared rows by a stage's steps; `ranks` is the number of processes."""
    units = len(prepared)
    tokens = float(prepared.unit_lengths[:, 1].sum())
    if not units or not tokens:
        return Usage(0, 0.0, 0.0)
    if train.steps is None:
        by_source = np.bincount(prepared.unit_sources, minlength=len(prepared.sources)).tolist()
        drawn = sum(epoch_counts(by_source, prepared.sources, prepared.data))
        passes = (train.epochs or 1.0) * drawn / units
    else:
        row = prepared.data.row_length if prepared.data.packing else tokens / units
        micro_batch = train.batch_tokens or train.batch_size * row
        passes = train.steps * train.gradient_accumulation * ranks * micro_batch / tokens
    shown = float(prepared.store.media_counts.sum())
    return Usage(len(prepared.media), passes * shown, passes * tokens, mean_patches(prepared))


def mean_patches(prepared: Prepared) -> float | None:
    """The mean patches of a distinct image, where images keep their shape."""
    patches = [media.grid.patches for media in prepared.media if media.grid is not None]
    return float(np.mean(patches)) if patches else None


def cache_choice(stage: Recipe, model: VisionLanguageNetwork, usage: Usage, *, gpu: bool) -> Choice:
    """Decides whether a stage caches its tower's features.

    Those that change are not: of a tower that is trained, and of streamed or augmented images. On a
    CPU others are wherever there is room: the tower leaves memory then. On a GPU they are where
    that saves at least `LEAST_SHARE` of the steps' work, and more time than writing them takes.

    Args:
        stage: the stage's recipe.
        model: the stage's model, tuned by its rules; it may be on the meta device.
        usage: what the stage's steps read.
        gpu: whether it trains on a GPU.
    """
    setting = stage.train.cache_features
    if model.llm.native:
        return Choice(
            False,
            "a native model's own forward pass takes images, and what its tower computes of them "
            "is not planned",
        )
    if stage.data.streaming or stage.data.augment:
        return Choice(False, f"images are {'streamed' if stage.data.streaming else 'augmented'}")
    if trains_tower(model):
        return Choice(False, "the tower is trained")
    if setting != "auto":
        return Choice(setting, f"train.cache_features: {str(setting).lower()}")
    tower = 2 * (usage.patches or model.tower.measure()[0])
    tower *= sum(p.numel() for p in model.tower.parameters())
    parameters = list(model.llm.parameters())
    language = sum(map(count_of, parameters))
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    # Forward pass and gradients of inputs, and of those weights that train.
    each_token = 2 * (2 * language + trained)
    return estimate(
        usage,
        image_bytes=_frame_bytes(model, DTYPES[stage.train.precision], usage.patches),
        tower_flops=tower,
        token_flops=each_token,
        room=_room(),
        gpu=gpu,
    )


def caches_images(
    model: VisionLanguageNetwork, media: Sequence[Media], setting: bool | Literal["auto"]
) -> bool:
    """Whether the features of images are cached, by `train.cache_features`.

    With auto they are where there is room for them in the tower's dtype.
    """
    if model.llm.native:
        return False
    if setting != "auto" or not media:
        return bool(media) and setting is True
    frames = len(media) * model.processor.images.most_frames
    return frames * _frame_bytes(model, next(model.tower.parameters()).dtype) <= _room()


def estimate(
    usage: Usage,
    *,
    image_bytes: int,
    tower_flops: float,
    token_flops: float,
    room: float,
    gpu: bool,
) -> Choice:
    """Decides by the figures alone.

    Args:
        usage: what the steps read.
        image_bytes: bytes of an image's features.
        tower_flops: of an image in the tower.
        token_flops: of a token in the LLM, forward and backward.
        room: bytes that features may take on the disk.
        gpu: whether the steps run on a GPU.
    """
    size = usage.images * image_bytes
    on_disk = f"{size / 1e9:,.2f} GB"
    if size > room:
        return Choice(False, f"they take {on_disk}, and there is room for {room / 1e9:,.2f} GB")
    if not gpu:
        return Choice(True, f"no step runs the tower, for {on_disk} on disk")
    repeats = usage.views / max(usage.images, 1)
    if repeats <= 1:
        return Choice(False, f"an image is shown {repeats:.2g} times: nothing would be saved")
    saved = (usage.views - usage.images) * tower_flops
    share = saved / (usage.views * tower_flops + usage.tokens * token_flops)
    shown = f"an image is shown {repeats:.2g} times, {share:.1%} of the work would be saved"
    if share < LEAST_SHARE:
        return Choice(False, f"{shown}, less than {LEAST_SHARE:.0%}")
    if saved / TOWER_RATE < size / WRITE_RATE:
        return Choice(False, f"{shown}, and writing {on_disk} takes longer than that")
    return Choice(True, f"{shown} for {on_disk} on disk")


def _frame_bytes(
    model: VisionLanguageNetwork, autocast: torch.dtype, patches: float | None = None
) -> int:
    """Bytes of the features of an image or a tile, as a run in this precision stores them.

    `patches` are those of a mean image, if known; else the largest is taken.
    """
    tokens, width = model.tower.measure()
    return round((patches or tokens) * width * stored_dtype(model.tower, autocast).itemsize)


def _room() -> float:
    """Bytes that features may take: a share of the free disk space, within the cache's limit.

    Space that features take already counts as free, so that a resumed run decides as before.
    """
    folder = cache_folder("features").absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        taken = sum(path.stat().st_size for path in folder.glob("*.npy"))
        free = shutil.disk_usage(existing).free + taken
    except OSError:
        free = math.inf
    return min(LARGEST_SHARE * free, cache_limit())
