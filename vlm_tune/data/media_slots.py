"""Which connected tokens of an image's frames fill its slots in the LLM's input.

A frame fills as many slots as the connector gives it tokens. The tiles of an image with a known
size (`Tile.size`) are joined before that: they are one picture, whose padding around the image
takes no slots, and each of whose rows ends with a learned token, which the connector puts behind
each frame's own (LLaVA-NeXT, `pack_image_features` of transformers' `modeling_llava_next.py`). So
lengths follow from an image's size alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vlm_tune.data.types import Media, Segment, Tile


def slots_of(media: Media, tokens: int) -> int:
    """The number of slots of a frame that the connector gives `tokens` tokens.

    The first tile of a joined picture has the slots of all of its tiles, the others have none.
    """
    tile = media.tile
    if tile is None or tile.size is None:
        return tokens
    return 0 if tile.column or tile.row else len(_picture(tile, tokens))


def segment_slots(segment: Segment, tokens: int) -> int:
    """The number of slots of a segment: its own ids', if a frame has them; none of a text."""
    if segment.ids is not None:
        return len(segment.ids)
    return slots_of(segment.payload, tokens) if isinstance(segment.payload, Media) else 0


def owners(media: Sequence[Media], tokens: int) -> np.ndarray:
    """The place in `media` of the frame that each slot is of, int64[P], see `slots_of`."""
    return np.repeat(np.arange(len(media)), [slots_of(frame, tokens) for frame in media])


def slot_tokens(media: Sequence[Media], tokens: int) -> np.ndarray | None:
    """The token that fills each slot, int64[P], of the frames' tokens one after the other.

    The connector gives a frame `tokens`, and the learned one behind them. None where no tiles are
    joined: all tokens fill slots in their order.
    """
    if all(frame.tile is None or frame.tile.size is None for frame in media):
        return None
    numbers = [np.empty(0, dtype=np.int64)]
    for place, frame in enumerate(media):
        tile = frame.tile
        if tile is None or tile.size is None:
            numbers.append(place * (tokens + 1) + np.arange(tokens))
        elif not tile.column and not tile.row:
            numbers.append(place * (tokens + 1) + _picture(tile, tokens))
    return np.concatenate(numbers)


def _picture(tile: Tile, tokens: int) -> np.ndarray:
    """The tokens of a joined picture's slots, row by row, numbered from its first tile's first."""
    return _joined(replace(tile, column=0, row=0), tokens)


@functools.lru_cache(maxsize=256)
def _joined(tile: Tile, tokens: int) -> np.ndarray:
    side = math.isqrt(tokens)
    numbers = np.arange(tile.rows * tile.columns * (tokens + 1)).reshape(-1, tokens + 1)
    grid = numbers[:, :tokens].reshape(tile.rows, tile.columns, side, side).transpose(0, 2, 1, 3)
    grid = grid.reshape(tile.rows * side, tile.columns * side)
    top, left = _padding(tile, *grid.shape)
    shown = grid[top : len(grid) - top, left : grid.shape[1] - left]
    return np.pad(shown, ((0, 0), (0, 1)), constant_values=tokens).flatten()


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
