"""Positions on three axes: time, row and column of a token (M-RoPE of the Qwen-VL models).

A token of text is at the same position on all three. An image's tokens are a grid that begins at
the next position on all of them, and the text after it continues behind the grid's longer side: an
image of 2 x 3 tokens after two of text, and two of text behind it,

    time     0 1 2 2 2 2 2 2 5 6
    row      0 1 2 2 2 3 3 3 5 6
    column   0 1 2 3 4 2 3 4 5 6

A video is such grids one after another, its times: in time they are `step` positions apart, and the
text goes on as behind one of them.

Shapes: B rows, L tokens, M images, P tokens of images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlm_tune.errors import ModelError


@dataclass(frozen=True)
class Shown:
    """The images or the videos of a batch.

    Attributes:
        slots: bool[B, L], their tokens.
        grids: int64[M, 3], the tokens of each in time, rows and columns, in the rows' order; None
            if there is none, whose tokens are then as text.
        steps: float32[M], the positions from one time of each to the next; None for 1.
    """

    slots: torch.Tensor
    grids: torch.Tensor | None
    steps: torch.Tensor | None = None


def image_axes(
    shown: list[Shown], visible_until: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Positions int64[3, B, L] of rows, each as in a row of its own sample.

    Args:
        shown: The images, and the videos.
        visible_until: int[B, L], see `tree_mask`.
        positions: The numbers [B, L] of tokens in their samples, from 0.

    Raises:
        ModelError: The rows have more or fewer tokens of images than these.
    """
    axes = positions.repeat(3, 1, 1)
    moves = []
    for each in shown:
        if each.grids is None or not len(each.grids):
            continue
        slots = each.slots.flatten().nonzero()[:, 0]
        spared, inside = _of_kind(slots, each.grids, each.steps, visible_until)
        axes = axes - spared
        moves.append((slots, inside))
    flat = axes.flatten(1)
    for slots, inside in moves:
        flat[:, slots] += inside
    return flat.view_as(axes)


def _of_kind(
    slots: torch.Tensor,
    grids: torch.Tensor,
    steps: torch.Tensor | None,
    visible_until: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many fewer positions than tokens are before each token, and how its own slots move.

    Returns:
        int64[B, L], and int64[3, P] of the slots int64[P], as places in the flattened rows.
    """
    length = visible_until.shape[1]
    sizes = grids.prod(1)
    ends = sizes.cumsum(0)
    if len(slots) != int(ends[-1]):
        raise ModelError(
            f"{len(slots)} image tokens in the rows, and their images have {int(ends[-1])}"
        )
    last = slots[ends - 1]
    row = last // length
    place = torch.arange(length, device=slots.device)
    # [M, L]: the tokens behind an image that see it.
    behind = (place > (last % length)[:, None]) & (
        place < visible_until[row, last % length][:, None]
    )
    spared = (sizes - grids[:, 1:].amax(1))[:, None] * behind
    of_rows = torch.zeros_like(visible_until).index_add(0, row, spared)
    image = torch.arange(len(grids), device=slots.device).repeat_interleave(sizes)
    number = torch.arange(len(slots), device=slots.device) - (ends - sizes)[image]
    _, rows, columns = grids[image].T
    time = number // (rows * columns)
    if steps is not None:
        time = (time * steps[image]).long()
    inside = torch.stack([time, number // columns % rows, number % columns])
    return of_rows, inside - number
