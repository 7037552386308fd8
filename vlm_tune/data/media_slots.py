"""Which connected tokens of an image's frames fill its slots in the LLM's input.

A frame fills as many slots as the connector gives it tokens. The tiles of an image with a known
size (`Tile.size`) are joined before that: they are one picture, whose padding around the image
takes no slots, and each of whose rows ends with a learned token, which the connector puts behind
each frame's own (LLaVA-NeXT, `pack_image_features` of transformers' `modeling_llava_next.py`). An
image that keeps its shape (`Media.grid`) fills a slot for each square of its patches; the tokens
that the connector gives it beyond these are padding. So lengths follow from an image's size alone.
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

    The first tile of a joined picture has the slots of all of its tiles, the others have none. An
    image that keeps its shape has those of its grid.
    """
    if media.grid is not None:
        return math.prod(media.grid.slots)
    tile = media.tile
    if tile is None or tile.size is None:
        return tokens
    return 0 if tile.column or tile.row else len(_picture(tile, tokens))


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


def slot_tokens(media: Sequence[Media], tokens: int) -> np.ndarray | None:
    """The token that fills each slot, int64[2, P]: its frame's place in `media`, and its number.

    The connector gives a frame `tokens`, and the learned one behind them. None where no tiles are
    joined and no image keeps its shape: all tokens fill slots in their order.
    """
    if all(frame.grid is None and (not frame.tile or not frame.tile.size) for frame in media):
        return None
    chosen = [np.empty((2, 0), dtype=np.int64)]
    for place, frame in enumerate(media):
        tile = frame.tile
        numbers = np.arange(slots_of(frame, tokens))
        if frame.grid is None and tile and tile.size and len(numbers):
            numbers = _picture(tile, tokens)
        tiles, numbers = np.divmod(numbers, tokens + 1)
        chosen.append(np.stack([place + tiles, numbers]))
    return np.concatenate(chosen, axis=1)


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
