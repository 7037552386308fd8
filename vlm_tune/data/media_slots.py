"""Which connected tokens of an image's frames fill its slots in the LLM's input.

A frame fills as many slots as the connector gives it tokens. The tiles of an image with a known
size (`Tile.size`) are joined before that: they are one picture, whose padding around the image
takes no slots, and each of whose rows ends with a learned token, which the connector puts behind
each frame's own (LLaVA-NeXT, `pack_image_features` of transformers' `modeling_llava_next.py`). An
image that keeps its shape (`Media.grid`) fills a slot for each square of its patches; the tokens
that the connector gives it beyond these are padding.

LLaVA-OneVision shrinks a picture of more tokens than `Tile.most` tiles have, so that a slot is a
sum of four tokens by their shares. Of several images of a row it makes no tiles: each is one frame,
with the learned token at its end (`Tile.ended`).

So lengths follow from the sizes of a row's images and their number alone. The frames of an image
are chosen in one place, `MediaProcessor.segments`, which is given that number.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlm_tune.data.types import Media, Segment, Tile

SHRUNK_FROM = 1.1
"""How much larger than `Tile.most` tiles a picture's sides are at least, if it is shrunk."""
CORNERS = 4
"""The tokens around a place between them."""


@dataclass(frozen=True)
class Filling:
    """The tokens that fill slots: each is the place of its frame, and its number in that.

    Attributes:
        tokens: the token of each slot, int64[2, P], or four tokens of each, int64[2, P, 4].
        shares: what each of four tokens counts for in a slot, float32[P, 4].
    """

    tokens: np.ndarray
    shares: np.ndarray | None = None

    def after(self, frames: int) -> Filling:
        """The same tokens, of frames that stand behind others."""
        places, numbers = self.tokens
        return replace(self, tokens=np.stack([places + frames, numbers]))

    def as_sums(self) -> Filling:
        """The same filling with four tokens in each slot: its one token, four times."""
        if self.shares is not None:
            return self
        shares = np.zeros((self.tokens.shape[1], CORNERS), dtype=np.float32)
        shares[:, 0] = 1
        return Filling(np.repeat(self.tokens[..., None], CORNERS, axis=2), shares)


def slots_of(media: Media, tokens: int) -> int:
    """The number of slots of a frame that the connector gives `tokens` tokens.

    The first tile of a joined picture has the slots of all of its tiles, the others have none. An
    image that keeps its shape has those of its grid.
    """
    if media.grid is not None:
        return math.prod(media.grid.slots)
    tile = media.tile
    if tile is None or (tile.size is None and not tile.ended):
        return tokens
    if tile.ended:
        return tokens + 1
    if tile.column or tile.row:
        return 0
    rows, columns = _shown_shape(tile, tokens)
    return rows * (columns + 1)


def segment_slots(segment: Segment, tokens: int) -> int:
    """The number of slots of a segment: its own ids', if a frame has them; none of a text."""
    if segment.ids is not None:
        return len(segment.ids)
    return slots_of(segment.payload, tokens) if isinstance(segment.payload, Media) else 0


def slot_mask(segment: Segment, length: int) -> list[bool]:
    """Which of a segment's `length` tokens are slots: a frame's, but for the ends of its rows."""
    if segment.row_ends is None:
        return [segment.kind == "media"] * length
    assert isinstance(segment.payload, Media)
    assert segment.payload.grid is not None
    rows, columns = segment.payload.grid.slots
    return ([True] * columns + [False]) * rows


def owners(media: Sequence[Media], tokens: int) -> np.ndarray:
    """The place in `media` of the frame that each slot is of, int64[P], see `slots_of`."""
    return np.repeat(np.arange(len(media)), [slots_of(frame, tokens) for frame in media])


def slot_tokens(media: Sequence[Media], tokens: int) -> Filling | None:
    """The tokens that fill the slots of frames.

    The connector gives a frame `tokens`, and the learned one behind them. None where no tiles are
    joined, no image is ended and none keeps its shape: all tokens fill slots in their order.
    """
    if all(
        frame.grid is None and (not frame.tile or not (frame.tile.size or frame.tile.ended))
        for frame in media
    ):
        return None
    fillings = [_filling(frame, tokens).after(place) for place, frame in enumerate(media)]
    if any(filling.shares is not None for filling in fillings):
        fillings = [filling.as_sums() for filling in fillings]
    shares = [filling.shares for filling in fillings if filling.shares is not None]
    return Filling(
        np.concatenate([filling.tokens for filling in fillings], axis=1),
        np.concatenate(shares) if shares else None,
    )


def _filling(frame: Media, tokens: int) -> Filling:
    """The tokens of a frame's slots; a picture's are of this frame and those behind it."""
    tile = frame.tile
    if frame.grid is not None or tile is None or tile.size is None or tile.column or tile.row:
        return _numbered(np.arange(slots_of(frame, tokens)), tokens)
    return _joined(tile, tokens)


def _numbered(numbers: np.ndarray, tokens: int, shares: np.ndarray | None = None) -> Filling:
    """The filling by tokens that are numbered through frames, each with the learned one."""
    return Filling(np.stack(np.divmod(numbers, tokens + 1)), shares)


def _shown_shape(tile: Tile, tokens: int) -> tuple[int, int]:
    """The rows and columns of tokens of a joined picture, without the rows' ends."""
    side = math.isqrt(tokens)
    rows = tile.rows * side
    columns = tile.columns * side
    top, left = _padding(tile, rows, columns)
    rows -= 2 * top
    columns -= 2 * left
    if tile.most is not None:
        ratio = math.sqrt(rows * columns / (tile.most * side * side))
        if ratio > SHRUNK_FROM:
            return int(rows // ratio), int(columns // ratio)
    return rows, columns


@functools.lru_cache(maxsize=64)
def _joined(tile: Tile, tokens: int) -> Filling:
    side = math.isqrt(tokens)
    numbers = np.arange(tile.rows * tile.columns * (tokens + 1)).reshape(-1, tokens + 1)
    grid = numbers[:, :tokens].reshape(tile.rows, tile.columns, side, side).transpose(0, 2, 1, 3)
    grid = grid.reshape(tile.rows * side, tile.columns * side)
    top, left = _padding(tile, *grid.shape)
    shown = grid[top : len(grid) - top, left : grid.shape[1] - left]
    shape = _shown_shape(tile, tokens)
    if shape == shown.shape:
        numbers = np.pad(shown, ((0, 0), (0, 1)), constant_values=tokens).flatten()
        return _numbered(numbers, tokens)
    corners, shares = _shrunk(shown, shape)
    end = ((0, 0), (0, 1), (0, 0))
    shares = np.pad(shares, end)
    shares[:, -1, 0] = 1
    corners = np.pad(corners, end, constant_values=tokens)
    return _numbered(corners.reshape(-1, CORNERS), tokens, shares.reshape(-1, CORNERS))


def _shrunk(numbers: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The four tokens around each place of a smaller picture, and their shares, [H, W, 4].

    They are those of bilinear interpolation as torch has it, without antialiasing.
    """
    above, below, down = _between(numbers.shape[0], shape[0])
    left, right, along = _between(numbers.shape[1], shape[1])
    corners = [
        numbers[np.ix_(rows, columns)] for rows in (above, below) for columns in (left, right)
    ]
    shares = [np.outer(high, wide) for high in (1 - down, down) for wide in (1 - along, along)]
    return np.stack(corners, axis=-1), np.stack(shares, axis=-1)


def _between(count: int, fewer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The places before and after each of `fewer` among `count`, and the share of the second.

    In 32 bits, as torch computes them.
    """
    scale = np.float32(count) / np.float32(fewer)
    half = np.float32(0.5)
    places = np.maximum(scale * (np.arange(fewer, dtype=np.float32) + half) - half, 0)
    before = places.astype(np.int64)
    return before, np.minimum(before + 1, count - 1), places - before.astype(np.float32)


def _padding(tile: Tile, height: int, width: int) -> tuple[int, int]:
    """The rows above and the columns left of an image in a picture of height x width tokens."""
    assert tile.size is not None
    image_width, image_height = tile.size
    # The rounding is that of transformers' `unpad_image`.
    if image_width / image_height > width / height:
        rows = int(round(image_height * (width / image_width), 7))
        return (height - rows) // 2, 0
    columns = int(round(image_width * (height / image_height), 7))
    return 0, (width - columns) // 2
