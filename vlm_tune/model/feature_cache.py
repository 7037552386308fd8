"""Cache of a frozen tower's features, computed once and stored in a memory-mapped file.

The file's name has a key (of the tower's weights, its preprocessing, the images' bytes and the
places of tiles in them) and the checksum of its content. So a file is either complete or absent,
and the features read are those that were computed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from vlm_tune.data.images.decode import encoded_bytes
from vlm_tune.data.types import Media
from vlm_tune.files import file_checksum
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.model.weights import fingerprint
from vlm_tune.resources import cache_folder, cache_room, check_cache, trim_cache

BATCH = 64


class FeatureStore:
    """Lookup of features by media item, in a memory-mapped cache."""

    def __init__(self, array: torch.Tensor, rows: dict[Media, int]) -> None:
        self._array = array
        self._rows = rows

    def __call__(self, media: Media) -> torch.Tensor:
        """The features float[N, D] of an item."""
        return self._array[self._rows[media]]


@torch.inference_mode()
def tower_features(
    model: VisionLanguageNetwork,
    media: Sequence[Media],
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> FeatureStore:
    """Features of all media and their tiles, from the cache or computed.

    They are computed in eval mode, in the tower's dtype.

    Args:
        model: the model whose tower and preprocessing are used.
        media: the images; repeated ones are computed once.
        progress: called with the number of images computed and their total.
        note: called with a message if a cached file was damaged.

    Raises:
        DataError: an image can't be decoded.
        RecipeError: the cache can't be written or has no room.
    """
    tower = model.tower
    processor = model.processor.images
    key = hashlib.sha256(
        (
            f"{fingerprint(tower)}:{model.config.model.tower}:{processor}"
            f":{model.config.tower_rebuild}"
        ).encode()
    )
    media = list(dict.fromkeys(part for item in media for part in processor.expand(item)))
    digests = _digests(media)
    distinct = list(dict.fromkeys(digests))
    key.update("".join(sorted(distinct)).encode())
    place = {digest: row for row, digest in enumerate(sorted(distinct))}
    rows = {item: place[digest] for item, digest in zip(media, digests, strict=True)}
    folder = cache_folder("features")
    name = key.hexdigest()[:40]
    path = _cached(folder, name, note)
    if path is None:
        first = dict(zip(digests, media, strict=True))
        path = _compute(
            model, [first[digest] for digest in sorted(distinct)], folder, name, progress
        )
        trim_cache(folder, path)
    with contextlib.suppress(OSError):  # the cache may be read-only
        os.utime(path)
    raw = torch.from_numpy(np.load(path, mmap_mode="c"))
    dtype = next(tower.parameters()).dtype
    return FeatureStore(raw.view(torch.bfloat16) if dtype == torch.bfloat16 else raw, rows)


def _cached(folder: Path, name: str, note: Callable[[str], None] | None) -> Path | None:
    """The intact file of a key, or None; damaged files are removed."""
    for path in sorted(folder.glob(f"{name}-*.npy")):
        with contextlib.suppress(FileNotFoundError):  # trimmed by another process meanwhile
            if path.stem == f"{name}-{file_checksum(path)}":
                return path
            if note:
                note(f"the features in {path} were damaged and are computed again")
            with contextlib.suppress(PermissionError):
                path.unlink()
    return None


def _digests(media: Sequence[Media]) -> list[str]:
    """A digest of each item: of its image's bytes, read once, and of a tile's place in it."""
    whole = {
        source: hashlib.sha256(encoded_bytes(Media(source))).hexdigest()
        for source in dict.fromkeys(item.source for item in media)
    }
    return [whole[item.source] + (f":{item.tile}" if item.tile else "") for item in media]


def _compute(
    model: VisionLanguageNetwork,
    media: Sequence[Media],
    folder: Path,
    name: str,
    progress: Callable[[int, int], None] | None,
) -> Path:
    """Writes the features of `media` as one array [images, N, D].

    Returns the file, which is named by its checksum.
    """
    check_cache(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tower = model.tower
    tokens, width = tower.measure()
    dtype = next(tower.parameters()).dtype
    # numpy has no bfloat16: its bits are stored as int16.
    stored = (
        np.int16
        if dtype == torch.bfloat16
        else np.float16
        if dtype == torch.float16
        else np.float32
    )
    temporary = folder / f"{name}.tmp-{os.getpid()}.npy"
    was = tower.training
    tower.eval()
    try:
        with cache_room(folder):
            array = np.lib.format.open_memmap(
                temporary, mode="w+", dtype=stored, shape=(len(media), tokens, width)
            )
            _reserve(temporary)
        for start in range(0, len(media), BATCH):
            pixels = torch.stack(
                [model.processor.images(item) for item in media[start : start + BATCH]]
            )
            # Without autocast: the same features whatever the caller's context.
            with torch.autocast(model.device.type, enabled=False):
                features = tower(pixels.to(model.device)).cpu()
            bits = features.view(torch.int16) if dtype == torch.bfloat16 else features
            array[start : start + len(pixels)] = bits.numpy()
            if progress:
                progress(min(start + BATCH, len(media)), len(media))
        array.flush()
        path = folder / f"{name}-{file_checksum(temporary)}.npy"
        temporary.rename(path)
        return path
    finally:
        temporary.unlink(missing_ok=True)
        tower.train(was)


def _reserve(path: Path) -> None:
    """Allocates a file's disk space: writing to a mapped file on a full disk kills the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                # Some network file systems can't reserve space.
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
