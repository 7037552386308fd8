"""Batches of images of variable resolution: patches one after the other, padded at the end.

Shapes: U images, N patches of the one with most, P pixels of a patch's side, D width of a tower.

A tower that keeps an image's shape takes uint8[U, N, 3 P²] and the row and column of each patch in
its image, int64[U, N, 2], which are -1 where there is none. Patches of a square that takes one slot
(`PatchGrid.merge`) stand together, row by row, and the squares in reading order: a connector that
joins a square's features needs no positions. The tower's features [U, N, D] have the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlm_tune.data.types import Media, PatchGrid

if TYPE_CHECKING:
    import torch


def patches_of(pixels: torch.Tensor, grid: PatchGrid) -> torch.Tensor:
    """The patches [N, 3 P²] of pixels [3, H, W], in the order of a batch."""
    import torch

    squares = (grid.rows // grid.merge, grid.columns // grid.merge)
    side = pixels.shape[1] // grid.rows
    split = pixels.reshape(3, squares[0], grid.merge, side, squares[1], grid.merge, side)
    return torch.permute(split, (1, 4, 2, 5, 0, 3, 6)).reshape(grid.patches, 3 * side * side)


def _places_of(grid: PatchGrid) -> torch.Tensor:
    """The row and column of each patch, int64[N, 2], in the order of a batch."""
    import torch

    numbers = torch.arange(grid.patches).view(grid.rows // grid.merge, grid.merge, -1, grid.merge)
    numbers = numbers.transpose(1, 2).flatten()
    return torch.stack([numbers // grid.columns, numbers % grid.columns], dim=1)


def patch_places(media: Sequence[Media]) -> torch.Tensor | None:
    """The row and column of each patch of images, int64[U, N, 2], -1 in the padding.

    None for images that a tower takes in one shape.
    """
    from torch.nn.utils.rnn import pad_sequence

    places = [_places_of(item.grid) for item in media if item.grid is not None]
    return pad_sequence(places, batch_first=True, padding_value=-1) if places else None


def token_counts(media: Sequence[Media]) -> torch.Tensor | None:
    """The number of connected tokens that are no padding of each image, int64[U].

    None for images that a tower takes in one shape.
    """
    import torch

    counts = [item.grid.slots[0] * item.grid.slots[1] for item in media if item.grid is not None]
    return torch.tensor(counts) if counts else None


def stacked(items: Sequence[torch.Tensor], media: Sequence[Media]) -> torch.Tensor:
    """One tensor of a tower's inputs for several media items, or of its features of them.

    An item is the pixels [3, H, W] of an image that keeps its shape, or has a line for each of its
    patches, and maybe padding; all others have one shape.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    lines = [
        patches_of(item, one.grid) if item.ndim == 3 else item[: one.grid.patches]
        for item, one in zip(items, media, strict=True)
        if one.grid is not None
    ]
    return pad_sequence(lines, batch_first=True) if lines else torch.stack(list(items))
