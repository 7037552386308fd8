"""Inspects media (bytes, size, perceptual hash) and finds images that look alike.

Two images look alike if their difference hashes are at most `distance` bits apart and their 8x8
thumbnails agree. The hash finds candidates fast and survives another encoding or size. Alone it
would not tell plain images of different colours, or shapes on white, apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from vlm_tune.data.audio.decode import waveform
from vlm_tune.data.images.decode import as_rgb, encoded_bytes, opened
from vlm_tune.data.types import Media, Video

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 8
"""Rows and columns of the hash and the thumbnail."""
STEP = 2
"""How much brighter than its left neighbour a cell must be to set its bit, of 255.

Noise on a plain background stays below it.
"""
INSPECTED_RATE = 16_000
"""Samples a second at which clips are decoded to try them."""
BRIGHTNESS = 16
CELL = 20
"""How far two thumbnails may differ: the mean of a channel, and a cell beyond that mean."""


@dataclass(frozen=True)
class ImageInfo:
    """Properties of an image, an audio clip or a video that can be decoded.

    `sha256` is its file's `bytes_digest`; width and height are after EXIF rotation.
    `dhash` has a bit for each cell of an 8x8 grid, set if it is brighter than the cell to its left.
    `thumbnail` is uint8[8, 8, 3] as bytes. A clip has a size of 0 x 0, and a `dhash` and a
    `thumbnail` that are hashes of its bytes: only the same file looks like it.
    """

    sha256: bytes
    width: int
    height: int
    format: str
    dhash: int
    thumbnail: bytes


def bytes_digest(data: bytes) -> bytes:
    """The first 16 bytes of the SHA-256 of an image's file."""
    return hashlib.sha256(data).digest()[:16]


def inspect_media(media: Media) -> ImageInfo:
    """Inspects an image, a clip or a video; raises as `inspect_image` or `waveform`."""
    if isinstance(media.source, Video):
        return inspect_video(media.source)
    return inspect_audio(media) if media.modality == "audio" else inspect_image(media)


def inspect_audio(media: Media) -> ImageInfo:
    """Inspects a clip; decodes all of it, so that a cut one is detected.

    Raises `DataError` as `waveform`.
    """
    waveform(media, INSPECTED_RATE)
    data = encoded_bytes(media)
    digest = hashlib.shake_128(data).digest(8 + 3 * SIDE * SIDE)
    return ImageInfo(
        bytes_digest(data), 0, 0, "audio", int.from_bytes(digest[:8], "big"), digest[8:]
    )


def inspect_video(video: Video) -> ImageInfo:
    """Inspects the frames of a video, of which the first one says what it looks like.

    Two are the same if all frames are, at the same places in their videos. Raises as
    `inspect_image`.
    """
    infos = [inspect_image(frame) for frame in video.frames]
    described = repr((video.places, video.count, video.fps, video.seconds)).encode()
    digest = bytes_digest(described + b"".join(info.sha256 for info in infos))
    return replace(infos[0], sha256=digest, format="video")


def inspect_image(media: Media) -> ImageInfo:
    """Inspects an image; decodes all of it, so that a truncated one is detected.

    Raises `DataError` as `decode_image`, and for unreadable files.
    """
    data = encoded_bytes(media)
    with opened(data, media.name) as header:
        kind = str(header.format)
        width, height = header.size
        # A JPEG is read to its end, but decoded at a low resolution that suffices for the hash:
        # several times faster.
        header.draft(None, (16 * SIDE, 16 * SIDE))  # type: ignore[arg-type]
        draft = header.size
        image = as_rgb(header)
    if image.size != draft:
        width, height = height, width
    return ImageInfo(
        bytes_digest(data),
        width,
        height,
        kind,
        _difference_hash(image),
        _thumbnail(image),
    )


def _difference_hash(image: Image) -> int:
    from PIL.Image import Resampling

    cells = np.asarray(image.convert("L").resize((SIDE + 1, SIDE), Resampling.BOX), dtype=np.int16)
    return int.from_bytes(np.packbits(np.diff(cells, axis=1) > STEP).tobytes(), "big")


def _thumbnail(image: Image) -> bytes:
    from PIL.Image import Resampling

    return image.resize((SIDE, SIDE), Resampling.BOX).tobytes()


def look_alikes(images: Sequence[ImageInfo], distance: int = 3) -> np.ndarray:
    """Groups inspected images that look alike, as `similar`.

    Returns int64[n]: for each image the index of the first one that it looks like, its own if there
    is none.
    """
    hashes = np.array([image.dhash for image in images], dtype=np.uint64)
    thumbnails = np.frombuffer(
        b"".join(image.thumbnail for image in images), dtype=np.uint8
    ).reshape(-1, SIDE * SIDE, 3)
    return similar(hashes, thumbnails, distance)


def similar(hashes: np.ndarray, thumbnails: np.ndarray, distance: int = 3) -> np.ndarray:
    """Groups images that look alike.

    Every member of a group looks like its first member, so groups do not drift from image to image.
    Hashes at most `distance` bits apart are equal in one of distance + 1 bands, so only images that
    share a band are compared. Memory grows with n; time grows with the images that share a band,
    all of them in the worst case.

    Args:
        hashes: uint64[n].
        thumbnails: uint8[n, 64, 3].
        distance: The largest number of bits by which hashes of one group differ.

    Returns:
        int64[n], for each image the index of the first member of its group.
    """
    count = len(hashes)
    first = np.arange(count)
    if not count:
        return first
    bands = [
        _Band(hashes, bits) for bits in np.array_split(np.arange(64, dtype=np.uint64), distance + 1)
    ]
    # Most images share no band with an earlier one.
    for place in np.flatnonzero(
        np.any([band.place > band.start for band in bands], axis=0)
    ).tolist():
        near = np.concatenate([band.earlier(place) for band in bands])
        near = near[first[near] == near]
        near = near[np.bitwise_count(hashes[near] ^ hashes[place]) <= distance]
        near = near[_agree(thumbnails[near], thumbnails[place])]
        if len(near):
            first[place] = near.min()
    return first


class _Band:
    """Images stably sorted by some bits of their hashes, so that equal bits are adjacent."""

    def __init__(self, hashes: np.ndarray, bits: np.ndarray) -> None:
        values = hashes & np.bitwise_or.reduce(np.uint64(1) << bits)
        self.order = np.argsort(values, kind="stable")
        ordered = values[self.order]
        self.start = np.empty(len(hashes), dtype=np.int64)
        self.start[self.order] = np.searchsorted(ordered, ordered)
        self.place = np.empty(len(hashes), dtype=np.int64)
        self.place[self.order] = np.arange(len(hashes))

    def earlier(self, image: int) -> np.ndarray:
        """The indices of earlier images with the same bits."""
        return self.order[self.start[image] : self.place[image]]


def _agree(thumbnails: np.ndarray, thumbnail: np.ndarray) -> np.ndarray:
    """bool[k]: which of uint8[k, 64, 3] agree with uint8[64, 3].

    The difference is at most what another encoding, size or exposure causes.
    """
    apart = thumbnails.astype(np.float32) - thumbnail
    mean = apart.mean(1, keepdims=True)
    return (np.abs(mean).max((1, 2)) <= BRIGHTNESS) & (np.abs(apart - mean).max((1, 2)) <= CELL)
