"""Cache of a frozen tower's features, computed once and stored in memory-mapped files.

A file holds the features of up to `PART` images, which may differ in their number of tokens. Its
name has a key (of the tower's weights, its preprocessing, the device and precision it runs in, the
images' bytes and the places of tiles in them) and the checksum of its content. So a file is either
complete or absent, and the features read are those that were computed.

The ranks of a run, and other runs on the same folder, share the work without talking to each other:
each computes the files that are missing and that no other process has locked, and reads the others.
A lock ends with its process, so what a killed one leaves is computed by another.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from vlm_tune.data.images.decode import encoded_bytes
from vlm_tune.data.types import Media
from vlm_tune.errors import Problem, RecipeError, TrainingError
from vlm_tune.files import file_checksum
from vlm_tune.model.tower_pass import decoding_threads, stored_dtype, tower_batches
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.model.weights import fingerprint
from vlm_tune.paths import reason, shown_path
from vlm_tune.resources import cache_folder, cache_room, check_cache, trim_cache

PART = 1024
"""Images of one file; a multiple of the batch on a CPU, so that batches are those of one file."""

PATIENCE = 2.0
"""Seconds between two looks at what other processes have left to compute."""

STORED = {torch.bfloat16: np.int16, torch.float16: np.float16, torch.float32: np.float32}
"""numpy's types by torch's: it has no bfloat16, whose bits are stored as int16."""


class FeatureStore:
    """Lookup of features by media item, in memory-mapped files of `PART` items each."""

    def __init__(
        self, parts: Sequence[torch.Tensor], lines: dict[Media, Lines], paths: Sequence[Path]
    ) -> None:
        self._parts = parts
        self._lines = lines
        self._paths = paths

    def __reduce__(self) -> tuple[Any, ...]:
        """Leaves the open files out: each loader process maps them again.

        Their files count as used now, so that others are trimmed before them. Raises
        `TrainingError` if one is gone.
        """
        for path in self._paths:
            try:
                os.utime(path)
            except FileNotFoundError:
                raise TrainingError(
                    f"{path}: this file of cached features was removed, as other runs do when the "
                    "cache is full; --resume computes it again, and $VLM_TUNE_CACHE_GB is the "
                    "cache's size"
                ) from None
            except OSError:  # the cache may be read-only
                continue
        return _mapped_store, (self._paths, self._lines)

    def __call__(self, media: Media) -> torch.Tensor:
        """The features float[N, D] of an item."""
        part, start, end = self._lines[media]
        return self._parts[part][start:end]


Lines = tuple[int, int, int]
"""Where an item's features are: the number of the file, and the first and last of its lines."""


def _mapped(path: Path) -> torch.Tensor:
    """The features in a file, one line [D] a token, in the dtype that `STORED` says.

    They are memory-mapped.
    """
    raw = torch.from_numpy(np.load(path, mmap_mode="c")).flatten(0, -2)
    return raw.view(torch.bfloat16) if raw.dtype == torch.int16 else raw


def _mapped_store(paths: Sequence[Path], lines: dict[Media, Lines]) -> FeatureStore:
    return FeatureStore([_mapped(path) for path in paths], lines, paths)


def tower_features(
    model: VisionLanguageNetwork,
    media: Sequence[Media],
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
    *,
    autocast: torch.dtype | None = None,
) -> FeatureStore:
    """Features of all media and their tiles, from the cache or computed.

    They are computed in eval mode as a step under `autocast` computes them, and stored in that
    dtype, or in the tower's where there is no autocast.

    Args:
        model: the model whose tower and preprocessing are used.
        media: the images; repeated ones are computed once.
        progress: called with the number of images that are there and their total, while some are
            computed.
        note: called with a message if a cached file was damaged.
        autocast: the dtype of the run's autocast, float32 for none. None stands for the tower's
            dtype: a model that was loaded finds the features of the run that trained it.

    Raises:
        DataError: an image can't be decoded.
        RecipeError: the cache can't be written or has no room.
    """
    autocast = autocast or next(model.tower.parameters()).dtype
    images = model.processor.images
    media = list(dict.fromkeys(part for item in media for part in images.expand(item)))
    digests = _digests(media)
    distinct = sorted(set(digests))
    first = dict(zip(digests, media, strict=True))
    parts = [distinct[start : start + PART] for start in range(0, len(distinct), PART)]
    place: dict[str, Lines] = {}
    for number, part in enumerate(parts):
        ends = np.cumsum([0, *(token_count(model, first[digest]) for digest in part)]).tolist()
        place |= {
            digest: (number, *lines)
            for digest, lines in zip(part, itertools.pairwise(ends), strict=True)
        }
    lines = {item: place[digest] for item, digest in zip(media, digests, strict=True)}
    base = _key(model, autocast)
    cache = _Cache(
        model,
        [_name(base, part) for part in parts],
        [[first[digest] for digest in part] for part in parts],
        autocast,
        progress or (lambda done, of: None),
        note or (lambda text: None),
    )
    with model.evaluating():
        features = cache.opened()
    return FeatureStore(features, lines, [cache.paths[number] for number in range(len(features))])


def token_count(model: VisionLanguageNetwork, media: Media) -> int:
    """The number of the tower's features of a frame: of an image that keeps its shape, its own."""
    return model.tower.measure()[0] if media.grid is None else media.grid.patches


def has_features(
    model: VisionLanguageNetwork,
    media: Sequence[Media],
    *,
    autocast: torch.dtype | None = None,
) -> bool:
    """Whether the features of all media, as one call of `tower_features` takes them, are cached.

    Their files are not read. Raises `DataError` for an image that can't be read.
    """
    images = model.processor.images
    parts = list(dict.fromkeys(part for item in media for part in images.expand(item)))
    distinct = sorted(set(_digests(parts)))
    base = _key(model, autocast or next(model.tower.parameters()).dtype)
    folder = cache_folder("features")
    return all(
        any(folder.glob(f"{_name(base, distinct[start : start + PART])}-*.npy"))
        for start in range(0, len(distinct), PART)
    )


def _key(model: VisionLanguageNetwork, autocast: torch.dtype) -> str:
    """All that features depend on except their images."""
    dtype = stored_dtype(model.tower, autocast)
    # As JSON, which a saved model's is read from: tuples are lists there.
    rebuild = json.dumps(model.config.tower_rebuild, sort_keys=True)
    return (
        f"{fingerprint(model.tower)}:{model.config.model.tower}:{model.processor.images}"
        f":{rebuild}:{model.device.type}:{autocast}:{dtype}"
    )


def _name(base: str, digests: Sequence[str]) -> str:
    return hashlib.sha256("".join([base, *digests]).encode()).hexdigest()[:40]


def _digests(media: Sequence[Media]) -> list[str]:
    """A digest of each item: of its image's bytes, read once, and of a tile's place in it."""
    sources = list(dict.fromkeys(item.source for item in media))

    def hashed(places: np.ndarray) -> list[str]:
        return [
            hashlib.sha256(encoded_bytes(Media(sources[place]))).hexdigest()
            for place in places.tolist()
        ]

    threads = decoding_threads()
    with ThreadPoolExecutor(threads) as pool:  # reading and hashing release the GIL
        shares = pool.map(hashed, np.array_split(np.arange(len(sources)), threads))
        whole = dict(zip(sources, chain.from_iterable(shares), strict=True))
    return [whole[item.source] + (f":{item.tile}" if item.tile else "") for item in media]


class _Cache:
    """The files of a set of images, each by its `name` and its list of media."""

    def __init__(
        self,
        model: VisionLanguageNetwork,
        names: list[str],
        media: list[list[Media]],
        autocast: torch.dtype,
        progress: Callable[[int, int], None],
        note: Callable[[str], None],
    ) -> None:
        self.model = model
        self.names = names
        self.media = media
        self.autocast = autocast
        self.progress = progress
        self.note = note
        self.folder = cache_folder("features")
        self.dtype = stored_dtype(model.tower, autocast)
        self.total = sum(map(len, media))
        self.paths: dict[int, Path] = {}
        self.arrays: dict[int, torch.Tensor] = {}

    def opened(self) -> list[torch.Tensor]:
        """The features of all files in order, one line a token; missing ones are computed."""
        missing = [number for number in range(len(self.names)) if not self._open(number)]
        if missing:
            check_cache(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            while missing:
                taken = [self._take(number, 0.0) for number in missing]
                if not any(taken):  # others compute all that is left
                    self.progress(self._done, self.total)
                    self._take(missing[0], PATIENCE)
                missing = [number for number in missing if number not in self.arrays]
            trim_cache(self.folder, *self.paths.values())
        return [self.arrays[number] for number in range(len(self.names))]

    @property
    def _done(self) -> int:
        """The images whose features are open."""
        return sum(len(self.media[number]) for number in self.arrays)

    def _open(self, number: int) -> bool:
        """Opens a file that is there; damaged ones are removed.

        Raises `RecipeError` for what can't be read in its place.
        """
        name = self.names[number]
        for path in sorted(self.folder.glob(f"{name}-*.npy")):
            with contextlib.suppress(FileNotFoundError):  # trimmed by another process meanwhile
                try:
                    intact = path.stem == f"{name}-{file_checksum(path)}"
                except (IsADirectoryError, PermissionError) as error:
                    message = (
                        f"these cached features can't be read: {reason(error)}; remove them, or "
                        "name another folder with VLM_TUNE_CACHE"
                    )
                    raise RecipeError([Problem(shown_path(path), message)]) from None
                if intact:
                    self.arrays[number] = _mapped(path)
                    self.paths[number] = path
                    with contextlib.suppress(OSError):  # the cache may be read-only
                        os.utime(path)
                    return True
                self.note(f"the features in {path} were damaged and are computed again")
                with contextlib.suppress(PermissionError):
                    path.unlink()
        return False

    def _take(self, number: int, patience: float) -> bool:
        """Opens a file, and computes it first if it is missing.

        Returns False if another process is computing it for `patience` seconds.
        """
        lock = self.folder / f"{self.names[number]}.lock"
        with _locked(lock, patience) as locked:
            if locked is None:
                return False
            if self._open(number):
                self.progress(self._done, self.total)
            else:
                self._compute(number, alone=locked)
                self._open(number)
            lock.unlink(missing_ok=True)
        return True

    def _compute(self, number: int, *, alone: bool) -> None:
        """Writes the features of a file's images as one array, the tokens of one after another.

        `alone` says that no other process of this host computes them: what is left of one is
        removed.
        """
        name = self.names[number]
        media = self.media[number]
        here = f"{name}.tmp-{socket.gethostname()}-"
        for left in self.folder.glob(f"{here}*.npy") if alone else ():
            left.unlink(missing_ok=True)
        temporary = self.folder / f"{here}{os.getpid()}.npy"
        try:
            counts = [token_count(self.model, item) for item in media]
            shape = (sum(counts), self.model.tower.measure()[1])
            with cache_room(self.folder):
                array = np.lib.format.open_memmap(
                    temporary, mode="w+", dtype=STORED[self.dtype], shape=shape
                )
                _reserve(temporary)
            written = 0
            line = 0
            for features in tower_batches(self.model, media, self.autocast):
                bits = features.view(torch.int16) if self.dtype == torch.bfloat16 else features
                for image in bits.numpy():
                    count = counts[written]
                    array[line : line + count] = image[:count]
                    line += count
                    written += 1
                self.progress(self._done + written, self.total)
            array.flush()
            temporary.rename(self.folder / f"{name}-{file_checksum(temporary)}.npy")
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path, patience: float) -> Iterator[bool | None]:
    """Context that holds a lock.

    Yields True; None if another process holds it for `patience` seconds; False where the file
    system has no locks: then several processes may do the same work, each for itself.
    """
    # As in `run_lock`, filelock's substitute for file systems without locks lets two in.
    lock = FileLock(path, timeout=patience, fallback_to_soft=False)
    state: bool | None = True
    try:
        lock.acquire()
    except Timeout:
        state = None
    except (OSError, NotImplementedError):
        state = False
    try:
        yield state
    finally:
        if state:
            lock.release()


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
