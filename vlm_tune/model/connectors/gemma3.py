"""Gemma 3's projector.

Shapes: M media, N tower tokens, D tower width, E LLM width.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from vlm_tune.config.connectors import Gemma3Connector
from vlm_tune.errors import ModelError
from vlm_tune.model.connectors.projectors import Connector, square
from vlm_tune.model.pooling import grid_means


class Gemma3Norm(nn.Module):
    """An RMSNorm in fp32 whose weight is the difference from 1."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., D]."""
        states = x.float()
        scale = torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.eps)
        return (states * scale * (1 + self.weight.float())).to(x.dtype)


class Gemma3Projector(Connector):
    """The mean of the tokens in each cell of a grid, an RMSNorm and one matrix.

    As transformers' `Gemma3MultiModalProjector`, with its matrix [D, E].
    """

    def __init__(self, config: Gemma3Connector, width: int, llm_width: int) -> None:
        super().__init__()
        self.grid = config.grid
        self.norm = Gemma3Norm(width, config.eps)
        self.projection = nn.Parameter(torch.randn(width, llm_width) * width**-0.5)

    def tokens(self, tower_tokens: int) -> int:
        """grid², for a tower's grid that it divides."""
        side = square(tower_tokens, "gemma3")
        if side % self.grid:
            raise ModelError(
                f"model.connector.grid: {self.grid} does not divide the tower's grid of "
                f"{side} x {side}"
            )
        return self.grid**2

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[M, N, D] to [M, grid², E]."""
        side = math.isqrt(features.shape[1])
        return self.norm(grid_means(features, (side, side), self.grid)) @ self.projection
