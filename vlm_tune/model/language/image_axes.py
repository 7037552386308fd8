"""Positions on three axes: time, row and column of a token (M-RoPE of the Qwen-VL models).

A token of text is at the same position on all three. An image's tokens are a grid that begins at
the next position on all of them, and the text after it continues behind the grid's longer side: an
image of 2 x 3 tokens after two of text, and two of text behind it,

    time     0 1 2 2 2 2 2 2 5 6
    row      0 1 2 2 2 3 3 3 5 6
    column   0 1 2 3 4 2 3 4 5 6

Shapes: B rows, L tokens, M images, P tokens of images.
"""

from __future__ import annotations

import torch

from vlm_tune.errors import ModelError


def image_axes(
    shown: torch.Tensor,
    grids: torch.Tensor | None,
    visible_until: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Positions int64[3, B, L] of rows, each as in a row of its own sample.

    Args:
        shown: bool[B, L], the tokens of images.
        grids: int64[M, 3], the tokens of each image in time, rows and columns, in the rows' order;
            None without images, whose tokens are then as text.
        visible_until: int[B, L], see `tree_mask`.
        positions: The numbers [B, L] of tokens in their samples, from 0.

    Raises:
        ModelError: The rows have more or fewer tokens of images than these.
    """
    axes = positions.repeat(3, 1, 1)
    if grids is None or not len(grids):
        return axes
    length = shown.shape[1]
    slots = shown.flatten().nonzero()[:, 0]
    sizes = grids.prod(1)
    ends = sizes.cumsum(0)
    if len(slots) != int(ends[-1]):
        raise ModelError(
            f"{len(slots)} image tokens in the rows, and their images have {int(ends[-1])}"
        )
    last = slots[ends - 1]
    row = last // length
    place = torch.arange(length, device=shown.device)
    # [M, L]: the tokens behind an image that see it.
    behind = (place > (last % length)[:, None]) & (
        place < visible_until[row, last % length][:, None]
    )
    spared = (sizes - grids[:, 1:].amax(1))[:, None] * behind
    axes = axes - torch.zeros_like(positions).index_add(0, row, spared)
    image = torch.arange(len(grids), device=shown.device).repeat_interleave(sizes)
    number = torch.arange(len(slots), device=shown.device) - (ends - sizes)[image]
    _, rows, columns = grids[image].T
    steps = torch.stack([number // (rows * columns), number // columns % rows, number % columns])
    flat = axes.flatten(1)
    flat[:, slots] += steps - number
    return flat.view_as(axes)
