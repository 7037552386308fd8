"""Safe decoding and preprocessing of images to uint8 pixels [3, H, W] of the tower's size."""

from __future__ import annotations

import io
import math
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from vlm_tune.data.affine import Affine
from vlm_tune.data.images.split import Split, best_grid
from vlm_tune.data.media_processor import MediaProcessor, frame_parts
from vlm_tune.data.types import Media, Modality, NativeInputs, Segment, Tile
from vlm_tune.errors import DataError
from vlm_tune.quoting import reason_of

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
MAX_PIXELS = 100_000_000
MAX_ASPECT = 200
ORIENTATION = 0x0112
"""The EXIF tag of the camera's orientation; values 5 to 8 exchange width and height."""
PNG_SIGNATURE = 8
"""Bytes of a PNG file before its first chunk."""
DAMAGED = (
    OSError,
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    SyntaxError,
    EOFError,
    RuntimeError,
    struct.error,
)
"""Exceptions that Pillow raises for damaged files (RuntimeError: AVIF)."""


@contextmanager
def opened(data: bytes | Path, name: str) -> Iterator[ImageFile]:
    """Opens an image and reads only its header.

    Raises `DataError` for images that are too large, and in place of Pillow's errors in the block.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            file = data if isinstance(data, Path) else io.BytesIO(data)
            with Image.open(file, formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise DataError(
                        f"{name}: {width}x{height} is more than {MAX_PIXELS:,} pixels",
                        kind="image_unreadable",
                    )
                if max(width, height) > MAX_ASPECT * min(width, height):
                    raise DataError(
                        f"{name}: {width}x{height}, sides of over {MAX_ASPECT} to 1",
                        kind="image_unreadable",
                    )
                yield image
    except UnidentifiedImageError:
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        raise DataError(
            f"{name}: not an image of {', '.join(FORMATS)} ({size} bytes)", kind="image_unreadable"
        ) from None
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise DataError(
            f"{name}: can't be decoded: {reason_of(error)}", kind="image_unreadable"
        ) from None


def decode_image(data: bytes, name: str = "<bytes>") -> Image:
    """Decodes an image to RGB.

    The first frame is used, EXIF rotation is applied, transparency is composited on white, and 16
    bits are scaled to 8.

    Raises `DataError` for formats other than PNG, JPEG, WebP, BMP, GIF, TIFF and AVIF, for
    truncated or empty files, and from the header alone for more than 100 megapixels or an aspect
    ratio over 200 to 1.
    """
    with opened(data, name) as image:
        return as_rgb(image)


def as_rgb(image: ImageFile) -> Image:
    """Decodes and converts an open image as `decode_image` does."""
    from PIL import Image

    shown = upright(image)
    if shown.mode.startswith("I;16") or shown.mode == "I":
        array = np.asarray(shown, dtype=np.uint32)
        return Image.fromarray((array >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if shown.mode in ("LA", "RGBA", "PA") or "transparency" in shown.info:
        rgba = shown.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return shown.convert("RGB")


def upright(image: Image) -> Image:
    """Decodes an image and applies its EXIF orientation.

    Unlike Pillow's `exif_transpose` it needs only this one EXIF tag to be readable.
    """
    from PIL.Image import Transpose

    flips = [Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM]
    turns = [Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90]
    # Of a PNG it is read as `image_size` reads it. For a TIFF `load` applies it and resets the tag.
    png = image.format == "PNG"
    before = _orientation(image, header=True) if png else 1
    image.load()
    orientation = before if png else _orientation(image)
    return image if orientation == 1 else image.transpose([*flips, *turns][orientation - 2])


def _orientation(image: Image, *, header: bool = False) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) if there is no readable EXIF data."""
    from PIL import Image as Pil

    try:
        # `PngImageFile.getexif` decodes the whole image, in search of a late EXIF chunk.
        if header and image.format == "PNG":
            exif = Pil.Image.getexif(image)
            if not exif and (late := _late_exif(getattr(image, "fp", None))):
                exif.load(late)
        else:
            exif = image.getexif()
        orientation = exif.get(ORIENTATION, 1)
    except DAMAGED:
        return 1
    return orientation if orientation in range(1, 9) else 1


def _late_exif(file: IO[bytes] | None) -> bytes | None:
    """The EXIF data of a PNG file behind its pixels, found by the lengths of chunks.

    None if it has none there, and for a file that is closed or cut.
    """
    if file is None:
        return None
    position = file.tell()
    try:
        file.seek(PNG_SIGNATURE)
        while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
            size = int.from_bytes(head[:4], "big")
            if head[4:] == b"eXIf":
                return file.read(size)
            file.seek(size + 4, os.SEEK_CUR)  # behind the chunk and its checksum
        return None
    finally:
        file.seek(position)


def encoded_bytes(media: Media) -> bytes:
    """Reads the encoded bytes of an image or a clip. Raises `DataError` if they cannot be read."""
    try:
        return media.read()
    except OSError as error:
        raise DataError(
            f"{media.name}: can't be read: {error.strerror or error}",
            kind=f"{media.modality}_unreadable",
        ) from None


def image_size(media: Media) -> tuple[int, int]:
    """(width, height) after EXIF rotation, from the header alone.

    Raises `DataError` as `decode_image`.
    """
    source = media.source if isinstance(media.source, Path) else encoded_bytes(media)
    with opened(source, media.name) as image:
        width, height = image.size
        # Pillow's size of a TIFF has the rotation applied.
        turned = image.format != "TIFF" and _orientation(image, header=True) >= 5
        return (height, width) if turned else (width, height)


# --- preprocessing ---


@dataclass(frozen=True)
class _Decoded:
    """A decoded image with the canvases its tiles are cut from; `data` are its encoded bytes.

    `frames` are those of a `Split`, by their tile.
    """

    data: bytes
    image: Image
    canvases: dict[tuple[int, int], Image] = field(default_factory=dict)
    frames: dict[Tile | None, Image] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageProcessor:
    """Converts images to the tower's input: uint8[3, size, size]; the tower normalises.

    `resize` is how an image is made square. With `tiles`, the grids (columns, rows) to choose from,
    or with a `split`, an image becomes several: see `segments`. A split has its way of making an
    image square; `resize` is then that of an image among several (`Tile.ended`).
    """

    size: int
    resize: Literal["squash", "crop", "pad"] = "crop"
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    tiles: tuple[tuple[int, int], ...] = ()
    split: Split | None = None
    _last: list[_Decoded] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def modality(self) -> Modality:
        """Images."""
        return "image"

    def fresh(self) -> ImageProcessor:
        """A copy that remembers no image."""
        return replace(self)

    @property
    def markers(self) -> tuple[str, ...]:
        """The control tokens around the frames of an image."""
        return tuple(self.split.markers) if self.split is not None else ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an image as the tower takes it."""
        return 3, self.size, self.size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of an image as the tower takes it."""
        import torch

        return torch.uint8

    @property
    def layout(self) -> tuple[Any, ...]:
        """All that an image's slots and places depend on, beside the tokens of a frame."""
        return self.tiles, self.split, self.size, self.resize

    def plain(self) -> Media:
        """An image of one colour."""
        from PIL import Image as Pil

        buffer = io.BytesIO()
        Pil.new("RGB", (self.size, self.size), (180, 60, 60)).save(buffer, format="PNG")
        return Media(buffer.getvalue())

    def parts(self, media: Media) -> tuple[str | Media, ...]:
        """An image itself, and of a video its frames with their times."""
        return frame_parts(media)

    def whole(self, media: Media) -> Media:
        """The frame that shows the whole image."""
        return media

    def segments(self, media: Media, place: int = 0, among: int = 1) -> list[Segment]:
        """The segments of an image in a prompt, at any place: its frames and their markers.

        Raises `DataError` for an unreadable header.
        """
        if self.split is None or media.tile is not None:
            return [Segment("media", frame) for frame in self._tiled(media)]
        return self.split.segments(media, image_size(media), self.size, among)

    def expand(self, media: Media, among: int = 1) -> tuple[Media, ...]:
        """The frames of an image in their order. Raises `DataError` for an unreadable header."""
        payloads = (segment.payload for segment in self.segments(media, among=among))
        return tuple(payload for payload in payloads if isinstance(payload, Media))

    @property
    def most_frames(self) -> int:
        """The largest number of frames of an image: the whole one and its tiles."""
        if self.split is not None:
            return self.split.most(self.size)
        return 1 + max((columns * rows for columns, rows in self.tiles), default=0)

    def _tiled(self, media: Media) -> tuple[Media, ...]:
        """The image, then the tiles of its best grid in reading order.

        For a grid of one tile it is the image alone.
        """
        if not self.tiles or media.tile is not None:
            return (media,)
        columns, rows = best_grid(*image_size(media), self.tiles, self.size)
        if columns * rows == 1:
            return (media,)
        return (
            media,
            *(
                replace(media, tile=Tile(column, row, columns, rows))
                for row in range(rows)
                for column in range(columns)
            ),
        )

    @property
    def controls(self) -> tuple[str, ...]:
        """Tokens of an image that no text may contain, where segments have tokens of their own."""
        return ()

    def save(self, folder: Path) -> None:
        """Writes what prepares images, where that is not in the model's config."""

    def inputs(self, media: Media) -> torch.Tensor | NativeInputs:
        """The inputs that the model takes of an image: pixels, as `__call__` gives them."""
        return self(media)

    def __call__(self, media: Media) -> torch.Tensor:
        """Pixels uint8[3, size, size]. Raises `DataError` if they cannot be read or decoded."""
        data = encoded_bytes(media)
        if not self.tiles and self.split is None and media.tile is None:
            return self.pixels(decode_image(data, media.name))
        # An image and its tiles are requested one after the other: the last one is cached.
        last = self._last[0] if self._last else None
        if last is None or last.data != data:
            last = _Decoded(data, decode_image(data, media.name))
            self._last[:] = [last]
        if media.tile is not None and media.tile.ended:
            return self.pixels(last.image)
        if self.split is not None:
            if not last.frames:
                last.frames.update(self.split.frames(last.image, self.size))
            return as_tensor(last.frames[media.tile])
        if media.tile is None:
            return self.pixels(last.image)
        grid = media.tile.columns, media.tile.rows
        if grid not in last.canvases:
            last.canvases[grid] = self._canvas(last.image, grid)
        left = media.tile.column * self.size
        top = media.tile.row * self.size
        return as_tensor(last.canvases[grid].crop((left, top, left + self.size, top + self.size)))

    def frame(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of what the model sees of an image of this size."""
        return self.size, self.size

    def places(self, width: int, height: int) -> Affine:
        """Where the places of an image of this size go in its frame: the whole, without tiles."""
        frame = self.size
        if self.split is not None or self.resize == "squash" or width == height:
            return Affine.scale(frame / width, frame / height)
        if self.resize == "pad":
            side = max(width, height)
            padded = Affine.shift((side - width) // 2, (side - height) // 2)
            return padded.then(Affine.scale(frame / side, frame / side))
        # As `pixels` crops.
        short = min(width, height)
        wide = frame * width // short
        high = frame * height // short
        resized = Affine.scale(wide / width, high / height)
        return resized.then(Affine.shift(-((wide - frame) // 2), -((high - frame) // 2)))

    def pixels(self, image: Image) -> torch.Tensor:
        """Resizes a whole decoded image to uint8[3, size, size]."""
        from PIL.Image import Resampling

        width, height = image.size
        if self.resize == "pad" and width != height:
            image = self._centred(image, (max(width, height), max(width, height)))
        elif self.resize == "crop" and width != height:
            # The longer side is rounded down, as in CLIP's preprocessing.
            short = min(width, height)
            width = self.size * width // short
            height = self.size * height // short
            image = image.resize((width, height), Resampling.BICUBIC)
            left = (width - self.size) // 2
            top = (height - self.size) // 2
            image = image.crop((left, top, left + self.size, top + self.size))
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Resampling.BICUBIC)
        return as_tensor(image)

    def _canvas(self, image: Image, grid: tuple[int, int]) -> Image:
        """The image fitted into a grid, aspect ratio kept, centred on the tower's mean colour."""
        from PIL.Image import Resampling

        wide = grid[0] * self.size
        high = grid[1] * self.size
        scale = min(wide / image.width, high / image.height)
        fitted = (
            min(math.ceil(image.width * scale), wide),
            min(math.ceil(image.height * scale), high),
        )
        return self._centred(image.resize(fitted, Resampling.BICUBIC), (wide, high))

    def _centred(self, image: Image, size: tuple[int, int]) -> Image:
        from PIL import Image as Pil

        if image.size == size:
            return image
        fill = tuple(int(255 * value) for value in self.mean)  # rounded down, as LLaVA's
        canvas = Pil.new("RGB", size, fill)  # type: ignore[arg-type]
        canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
        return canvas


def as_tensor(image: Image) -> torch.Tensor:
    """The pixels uint8[3, H, W] of an image."""
    import torch

    # By numpy: torch would start threads of its own in each thread that decodes.
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())


class PixelCache:
    """Caches what the tower takes of images or clips, up to a number of bytes.

    Those beyond the limit are decoded each time.
    """

    def __init__(self, processor: MediaProcessor, max_bytes: int = 1 << 28) -> None:
        self.processor = processor
        self.max_bytes = max_bytes
        self._left = max_bytes
        self._kept: dict[Media, torch.Tensor | NativeInputs] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Leaves the pixels out: each loader process caches its own."""
        return PixelCache, (self.processor.fresh(), self.max_bytes)

    def __call__(self, media: Media) -> torch.Tensor | NativeInputs:
        """The inputs that the model takes of a media item, as `MediaProcessor.inputs`."""
        pixels = self._kept.get(media)
        if pixels is None:
            pixels = self.processor.inputs(media)
            tensors = pixels.values() if isinstance(pixels, dict) else [pixels]
            size = sum(tensor.nbytes for tensor in tensors)
            if self._left >= size:
                self._left -= size
                self._kept[media] = pixels
        return pixels
