"""Features of a frozen tower, computed once and kept in a memory-mapped file.

The key is the tower's weights, its preprocessing, the images' bytes and places of tiles in them; what is read back is what was computed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from vlm_tune.data.images import encoded_bytes
from vlm_tune.data.types import Media
from vlm_tune.model.vlm import VisionLanguageModel
from vlm_tune.model.weights import fingerprint
from vlm_tune.resources import cache_folder, trim_cache

BATCH = 64


class FeatureStore:
    """Features [N, D] of images by their media item, from a memory-mapped cache."""

    def __init__(self, array: torch.Tensor, rows: dict[Media, int]) -> None:
        self._array, self._rows = array, rows

    def __call__(self, media: Media) -> torch.Tensor:
        """float[N, D]."""
        return self._array[self._rows[media]]


@torch.inference_mode()
def tower_features(model: VisionLanguageModel, media: Sequence[Media], progress: Callable[[int, int], None] | None = None) -> FeatureStore:
    """Features of all media and their tiles by the model's tower in eval mode, computed in the tower's dtype where not cached.

    Raises `DataError` for an image that can't be decoded.
    """
    tower, processor = model.tower, model.processor.images
    key = hashlib.sha256(f"{fingerprint(tower)}:{model.config.model.tower}:{processor}:{model.config.tower_rebuild}".encode())
    media = list(dict.fromkeys(part for item in media for part in processor.expand(item)))
    digests = _digests(media)
    distinct = list(dict.fromkeys(digests))
    key.update("".join(sorted(distinct)).encode())
    place = {digest: row for row, digest in enumerate(sorted(distinct))}
    rows = {item: place[digest] for item, digest in zip(media, digests, strict=True)}
    path = cache_folder("features") / f"{key.hexdigest()[:40]}.npy"
    if not path.is_file():
        first = dict(zip(digests, media, strict=True))
        _compute(model, [first[digest] for digest in sorted(distinct)], path, progress)
        trim_cache(path.parent, path)
    os.utime(path)
    raw = torch.from_numpy(np.load(path, mmap_mode="c"))
    dtype = next(tower.parameters()).dtype
    return FeatureStore(raw.view(torch.bfloat16) if dtype == torch.bfloat16 else raw, rows)


def _digests(media: Sequence[Media]) -> list[str]:
    """What each item is known by: its image's bytes, read once, and the place of a tile in it."""
    whole = {source: hashlib.sha256(encoded_bytes(Media(source))).hexdigest() for source in dict.fromkeys(item.source for item in media)}
    return [whole[item.source] + (f":{item.tile}" if item.tile else "") for item in media]


def _compute(model: VisionLanguageModel, media: Sequence[Media], path: Path, progress: Callable[[int, int], None] | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tower = model.tower
    tokens, width = tower.measure()
    dtype = next(tower.parameters()).dtype
    # numpy has no bfloat16: its bits are kept as int16.
    stored = np.int16 if dtype == torch.bfloat16 else np.float16 if dtype == torch.float16 else np.float32
    temporary = path.with_suffix(f".tmp-{os.getpid()}.npy")
    array = np.lib.format.open_memmap(temporary, mode="w+", dtype=stored, shape=(len(media), tokens, width))
    was = tower.training
    tower.eval()
    try:
        for start in range(0, len(media), BATCH):
            pixels = torch.stack([model.processor.images(item) for item in media[start : start + BATCH]])
            with torch.autocast(model.device.type, enabled=False):  # the same features wherever they are asked for
                features = tower(pixels.to(model.device)).cpu()
            bits = features.view(torch.int16) if dtype == torch.bfloat16 else features
            array[start : start + len(pixels)] = bits.numpy()
            if progress:
                progress(min(start + BATCH, len(media)), len(media))
        array.flush()
        temporary.rename(path)
        path.with_suffix(".json").write_text(json.dumps({"images": len(media), "tokens": tokens, "width": width, "dtype": str(dtype)}))
    finally:
        temporary.unlink(missing_ok=True)
        tower.train(was)
