"""Preprocessing of images for towers that keep an image's shape."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from vlm_tune.data.affine import Affine
from vlm_tune.data.images.decode import (
    ImageProcessor,
    as_tensor,
    decode_image,
    encoded_bytes,
    image_size,
)
from vlm_tune.data.types import Media, PatchGrid, Segment

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image, Resampling

ROW_ENDS = ("[IMG_BREAK]", "[IMG_END]")
"""The tokens after each row of a Pixtral's image but the last, and after the last."""
SMALLEST = 1e-5
"""The difference of scales at which a search ends."""


class Sizing(Protocol):
    """A tower's rule for the size that an image gets."""

    @property
    def resample(self) -> int:
        """Pillow's number of the way in which an image is resized."""
        ...

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """The rows and columns of squares of patches of an image of this size."""
        ...


@dataclass(frozen=True)
class LongestEdge:
    """Larger images are shrunk until their longer side has `size` pixels; others keep their size.

    Then both sides are rounded up to whole squares of `unit` pixels. As transformers' Pixtral has
    it (`image_processing_pil_pixtral.py`).
    """

    size: int
    unit: int
    resample = 3
    """Bicubic."""

    def grid(self, width: int, height: int) -> tuple[int, int]:
        ratio = max(height / self.size, width / self.size)
        if ratio > 1:
            width = math.floor(width / ratio)
            height = math.floor(height / ratio)
        # A side that shrinks to nothing is one square: transformers fails there.
        return max((height - 1) // self.unit + 1, 1), max((width - 1) // self.unit + 1, 1)


@dataclass(frozen=True)
class MostPatches:
    """Images get the largest size of their shape of at most `count` squares of `unit` pixels.

    As transformers' SigLIP 2 has it (`image_processing_pil_siglip2.py`), to the bit: a scale is
    searched for by halving.
    """

    count: int
    unit: int
    resample = 2
    """Bilinear."""

    def grid(self, width: int, height: int) -> tuple[int, int]:
        low = SMALLEST / 10
        high = 100.0
        while high - low >= SMALLEST:
            scale = (low + high) / 2
            if math.prod(self._scaled(width, height, scale)) <= self.count:
                low = scale
            else:
                high = scale
        return self._scaled(width, height, low)

    def _scaled(self, width: int, height: int, scale: float) -> tuple[int, int]:
        rows, columns = (max(math.ceil(side * scale / self.unit), 1) for side in (height, width))
        return rows, columns


@dataclass(frozen=True)
class ShapedImages(ImageProcessor):
    """Prepares images in their native aspect ratio, resized to whole squares of patches.

    Attributes:
        sizing: The size that an image gets.
        patch: Pixels of a patch's side.
        merge: Patches of a square's side; a square takes one slot.
        row_ends: Whether the tokens `ROW_ENDS` stand after the rows of an image's slots.
    """

    sizing: Sizing = LongestEdge(1024, 16)
    patch: int = 16
    merge: int = 1
    row_ends: bool = False

    @property
    def layout(self) -> tuple[Any, ...]:
        return self.sizing, self.patch, self.merge, self.row_ends

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tower's input for a square image of the largest size."""
        return (self.size // self.patch) ** 2, 3 * self.patch**2

    @property
    def markers(self) -> tuple[str, ...]:
        """The control tokens after the rows of an image."""
        return ROW_ENDS if self.row_ends else ()

    def whole(self, media: Media) -> Media:
        """The image with the grid of its patches. Raises `DataError` for an unreadable header."""
        return media if media.grid else replace(media, grid=self._grid(*image_size(media)))

    def segments(self, media: Media, place: int = 0, among: int = 1) -> list[Segment]:
        """The image's segment. Raises `DataError` for an unreadable header."""
        ends = ROW_ENDS if self.row_ends else None
        return [Segment("media", self.whole(media), row_ends=ends)]

    def frame(self, width: int, height: int) -> tuple[int, int]:
        grid = self._grid(width, height)
        return grid.columns * self.patch, grid.rows * self.patch

    def places(self, width: int, height: int) -> Affine:
        frame_width, frame_height = self.frame(width, height)
        return Affine.scale(frame_width / width, frame_height / height)

    def plain(self) -> Media:
        """A small image of one colour."""
        from PIL import Image as Pil

        side = self.patch * self.merge
        buffer = io.BytesIO()
        Pil.new("RGB", (2 * side, side), (180, 60, 60)).save(buffer, format="PNG")
        return Media(buffer.getvalue())

    def __call__(self, media: Media) -> torch.Tensor:
        """Pixels uint8[3, H, W] of whole squares. Raises `DataError` for unreadable images."""
        return self.pixels(decode_image(encoded_bytes(media), media.name))

    def pixels(self, image: Image) -> torch.Tensor:
        """Resizes a decoded image to uint8[3, H, W]."""
        from PIL.Image import Resampling

        size = self.frame(*image.size)
        resample: Resampling = Resampling(self.sizing.resample)
        return as_tensor(image if image.size == size else image.resize(size, resample))

    def _grid(self, width: int, height: int) -> PatchGrid:
        rows, columns = self.sizing.grid(width, height)
        return PatchGrid(rows * self.merge, columns * self.merge, self.merge)
