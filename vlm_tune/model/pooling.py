"""Adaptive average pooling of a grid of tokens, as a product with a matrix along each side.

torch's own has no deterministic backward pass on a GPU; a product's is one more product.

Shapes: B images, h x w tokens of a grid, C width.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from vlm_tune.precision import autocast_dtype


def grid_means(features: torch.Tensor, size: tuple[int, int], grid: int) -> torch.Tensor:
    """The means of the cells of a grid, [B, grid², C] in row-major order.

    They are those of `torch.nn.functional.adaptive_avg_pool2d`: where `grid` does not divide a
    side, neighbouring cells overlap. Computed in fp32, also under autocast.

    Args:
        features: [B, h * w, C], in row-major order.
        size: (h, w).
        grid: cells of each side.
    """
    if size == (grid, grid):
        return features
    rows, columns = (_weights(side, grid, features.device) for side in size)
    maps = features.float().unflatten(1, size)
    casts = autocast_dtype(features.device) is not None
    with torch.autocast(features.device.type, enabled=False) if casts else nullcontext():
        means = torch.einsum("gh,bhwc,kw->bgkc", rows, maps, columns)
    return means.flatten(1, 2).to(features.dtype)


def _weights(side: int, grid: int, device: torch.device) -> torch.Tensor:
    """float32[grid, side], the weights of a side's tokens in the means of its cells."""
    cells = torch.arange(grid, device=device)[:, None]
    tokens = torch.arange(side, device=device)
    first = cells * side // grid
    behind = ((cells + 1) * side + grid - 1) // grid
    spans = (first <= tokens) & (tokens < behind)
    return spans / spans.sum(1, keepdim=True)
