"""How a vision-language model cuts an image into frames of its tower's size, and marks them.

A frame is a tile or the whole image. Each takes the same number of slots, or tiles are joined and
what is padding takes none (`vlm_tune/data/media_slots.py`); what stands between frames is text and
control tokens. So a row's length is known from the size of its images alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from vlm_tune.config.towers import AnySplit
from vlm_tune.data.images.gemma3_frames import Gemma3Frames
from vlm_tune.data.media_slots import SHRUNK_FROM
from vlm_tune.data.types import Media, Segment, Tile

if TYPE_CHECKING:
    from PIL.Image import Image


class Split(Protocol):
    """A model's way of cutting images; `side` is the side of a frame in pixels."""

    @property
    def markers(self) -> tuple[str, ...]:
        """Control tokens that the tokenizer must have. Others are plain text where it has none."""
        ...

    def most(self, side: int) -> int:
        """The largest number of frames of an image."""
        ...

    def segments(
        self, media: Media, size: tuple[int, int], side: int, among: int = 1
    ) -> list[Segment]:
        """The frames of an image of `size` (width, height) and the markers around them, in order.

        `among` is the number of images of its row. A text at either end is tokenised together with
        the text beside it.
        """
        ...

    def frames(self, image: Image, side: int) -> Mapping[Tile | None, Image]:
        """The frames of a decoded image by their tile; None is the whole image."""
        ...


@dataclass(frozen=True)
class Idefics3Frames:
    """Tiles in reading order with the names of their rows and columns, then the whole image.

    As transformers' Idefics3 and SmolVLM processors have it (`image_processing_idefics3.py`,
    `processing_idefics3.py`): an image is resized so that its longer side is `longest_edge`, then
    to multiples of the tower's size, and cut. The whole image is the same one made square.
    """

    longest_edge: int
    around = "<fake_token_around_image>"
    whole = "<global-img>"

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.around,)

    def most(self, side: int) -> int:
        tiles = math.ceil(self.longest_edge / side)
        return tiles * tiles + (tiles > 1)

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size (width, height) of an image whose longer side became `longest_edge`.

        The shorter one is rounded down, and up to an even number.
        """
        width, height = size
        ratio = width / height
        if width >= height:
            shorter = int(self.longest_edge / ratio)
            return self.longest_edge, max(shorter + shorter % 2, 1)
        shorter = int(self.longest_edge * ratio)
        return max(shorter + shorter % 2, 1), self.longest_edge

    def _grid(self, size: tuple[int, int], side: int) -> tuple[int, int]:
        """The number of columns and rows of tiles of an image of `size`."""
        width, height = self._resized(size)
        ratio = width / height
        # The shorter side follows the longer one's rounding up.
        if width >= height:
            columns = math.ceil(width / side)
            return columns, math.ceil(max(int(columns * side / ratio), 1) / side)
        rows = math.ceil(height / side)
        return math.ceil(max(int(rows * side * ratio), 1) / side), rows

    def segments(
        self, media: Media, size: tuple[int, int], side: int, among: int = 1
    ) -> list[Segment]:
        columns, rows = self._grid(size, side)
        around = Segment("control", self.around)
        segments: list[Segment] = []
        if columns * rows > 1:
            for row in range(rows):
                for column in range(columns):
                    name = Segment("control", f"<row_{row + 1}_col_{column + 1}>")
                    tile = replace(media, tile=Tile(column, row, columns, rows))
                    segments += [around, name, Segment("media", tile)]
                segments.append(Segment("text", "\n" if row < rows - 1 else "\n\n"))
        return [*segments, around, Segment("control", self.whole), Segment("media", media), around]

    def frames(self, image: Image, side: int) -> Mapping[Tile | None, Image]:
        from PIL.Image import Resampling

        columns, rows = self._grid(image.size, side)
        canvas = image.resize(self._resized(image.size), Resampling.LANCZOS).resize(
            (columns * side, rows * side), Resampling.LANCZOS
        )
        whole = canvas.resize((side, side), Resampling.LANCZOS)
        return {None: whole, **cut(canvas, Tile(0, 0, columns, rows), side)}


@functools.lru_cache(maxsize=8)
def _grids(most: int) -> list[tuple[int, int]]:
    """The grids (columns, rows) of at most so many tiles, those of fewer tiles first."""
    sides = range(1, most + 1)
    grids = [(columns, rows) for columns in sides for rows in sides if columns * rows <= most]
    return sorted(grids, key=math.prod)


@dataclass(frozen=True)
class InternVLFrames:
    """Tiles in reading order, then the whole image, between a start and an end token.

    As transformers' InternVL has it (`image_processing_pil_got_ocr2.py`,
    `processing_internvl.py`): an image is resized to the grid whose aspect ratio is nearest to its
    own. One whose grid is a single tile is the whole image alone.
    """

    max_tiles: int
    start = "<img>"
    end = "</img>"

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.start, self.end)

    def most(self, side: int) -> int:
        return self.max_tiles + (self.max_tiles > 1)

    def _grid(self, size: tuple[int, int], side: int) -> tuple[int, int]:
        """The number of columns and rows of tiles of an image of `size`.

        Of grids of one shape the larger is taken if the image has half of its pixels.
        """
        width, height = size
        best = (1, 1)
        nearest = math.inf
        for columns, rows in _grids(self.max_tiles):
            difference = abs(width / height - columns / rows)
            tie = difference == nearest and width * height > 0.5 * side * side * columns * rows
            if difference < nearest or tie:
                best = (columns, rows)
                nearest = difference
        return best

    def segments(
        self, media: Media, size: tuple[int, int], side: int, among: int = 1
    ) -> list[Segment]:
        columns, rows = self._grid(size, side)
        tiles = [
            Segment("media", replace(media, tile=Tile(column, row, columns, rows)))
            for row in range(rows)
            for column in range(columns)
            if columns * rows > 1
        ]
        start = Segment("control", self.start)
        return [start, *tiles, Segment("media", media), Segment("control", self.end)]

    def frames(self, image: Image, side: int) -> Mapping[Tile | None, Image]:
        from PIL.Image import Resampling

        columns, rows = self._grid(image.size, side)
        frames: dict[Tile | None, Image] = {None: image.resize((side, side), Resampling.BICUBIC)}
        if columns * rows > 1:
            canvas = image.resize((columns * side, rows * side), Resampling.BICUBIC)
            frames |= cut(canvas, Tile(0, 0, columns, rows), side)
        return frames


def best_grid(
    width: int, height: int, grids: Sequence[tuple[int, int]], size: int
) -> tuple[int, int]:
    """The grid (columns, rows) of size x size tiles that shows most of an image's pixels.

    Ties are decided by the least padding. This is the rule of LLaVA-NeXT
    (https://llava-vl.github.io/blog/2024-01-30-llava-next/): the image is fitted inside the grid,
    and upscaled pixels do not count.
    """

    def shown_and_unused(grid: tuple[int, int]) -> tuple[int, int]:
        scale = min(grid[0] * size / width, grid[1] * size / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - grid[0] * grid[1] * size * size

    return max(grids, key=shown_and_unused)


@dataclass(frozen=True)
class LlavaNextFrames:
    """The whole image, then the tiles of the grid that shows most of it, which are joined again.

    As transformers' LLaVA-NeXT has it (`image_processing_pil_llava_next.py`): the whole is made
    square whatever its shape, and the grid is filled from the middle, the rest black.
    """

    grids: tuple[tuple[int, int], ...]
    markers: tuple[str, ...] = ()

    def most(self, side: int) -> int:
        return 1 + max(map(math.prod, self.grids))

    def segments(
        self, media: Media, size: tuple[int, int], side: int, among: int = 1
    ) -> list[Segment]:
        tiles = tiles_of(self._tile(*best_grid(*size, self.grids, side), size))
        return [
            Segment("media", media),
            *(Segment("media", replace(media, tile=tile)) for tile in tiles),
        ]

    def frames(self, image: Image, side: int) -> Mapping[Tile | None, Image]:
        from PIL import Image as Pil

        columns, rows = best_grid(*image.size, self.grids, side)
        wide = columns * side
        high = rows * side
        by_width = wide / image.width
        by_height = high / image.height
        if by_width < by_height:
            fitted = wide, min(math.ceil(image.height * by_width), high)
        else:
            fitted = min(math.ceil(image.width * by_height), wide), high
        canvas = Pil.new("RGB", (wide, high))
        place = (wide - fitted[0]) // 2, (high - fitted[1]) // 2
        canvas.paste(image.resize(fitted, Pil.Resampling.BICUBIC), place)
        whole = image.resize((side, side), Pil.Resampling.BICUBIC)
        return {None: whole, **cut(canvas, self._tile(columns, rows, image.size), side)}

    def _tile(self, columns: int, rows: int, size: tuple[int, int]) -> Tile:
        """The first tile of a grid for an image of `size`."""
        return Tile(0, 0, columns, rows, size)


@dataclass(frozen=True)
class LlavaOnevisionFrames(LlavaNextFrames):
    """As LLaVA-NeXT's, but the picture of more than about `max_tiles` tiles is shrunk.

    An image among several of a row is seen whole alone, made square by `ImageProcessor.resize`, and
    ends with a learned token. As transformers' LLaVA-OneVision has it
    (`image_processing_pil_llava_onevision.py`, `processing_llava_onevision.py`).
    """

    max_tiles: int = 9

    def segments(
        self, media: Media, size: tuple[int, int], side: int, among: int = 1
    ) -> list[Segment]:
        if among > 1:
            return [Segment("media", replace(media, tile=Tile(0, 0, 1, 1, ended=True)))]
        return super().segments(media, size, side)

    def most_joined(self, side: int) -> int:
        """The most frames whose tokens an image takes: the tokens of more are shrunk to fewer."""
        return min(self.most(side), 1 + math.ceil(SHRUNK_FROM**2 * self.max_tiles))

    def _tile(self, columns: int, rows: int, size: tuple[int, int]) -> Tile:
        return replace(super()._tile(columns, rows, size), most=self.max_tiles)


def tiles_of(first: Tile) -> list[Tile]:
    """The tiles of the grid that has `first` as its first, in reading order."""
    places = [(column, row) for row in range(first.rows) for column in range(first.columns)]
    return [replace(first, column=column, row=row) for column, row in places]


def cut(canvas: Image, first: Tile, side: int) -> dict[Tile, Image]:
    """The tiles of a canvas that is a grid of tiles, of which `first` is the first."""
    return {
        tile: canvas.crop(
            (
                tile.column * side,
                tile.row * side,
                (tile.column + 1) * side,
                (tile.row + 1) * side,
            )
        )
        for tile in tiles_of(first)
    }


def split_of(config: AnySplit | None) -> Split | None:
    """The way of cutting images in a recipe's `model.tower.split`; None if it has none."""
    if config is None:
        return None
    return SPLITS[config.kind](**config.model_dump(exclude={"kind"}))


SPLITS: dict[str, Callable[..., Split]] = {
    "idefics3": Idefics3Frames,
    "internvl": InternVLFrames,
    "gemma3": Gemma3Frames,
    "llava_next": lambda grids: LlavaNextFrames(tuple(map(tuple, grids))),
    "llava_onevision": lambda grids, max_tiles: LlavaOnevisionFrames(
        tuple(map(tuple, grids)), max_tiles=max_tiles
    ),
}
"""The ways of cutting images by their kind in a recipe; their options are the recipe's."""
