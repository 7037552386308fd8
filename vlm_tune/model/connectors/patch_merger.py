"""Mistral 3's projector.

Shapes: M media, N tower tokens, D tower width, E LLM width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import rms_norm

from vlm_tune.config.connectors import PatchMergerConnector
from vlm_tune.errors import ModelError
from vlm_tune.model.connectors.projectors import Connector, mlp, square


class Norm(nn.RMSNorm):
    """An RMSNorm in fp32, whatever the dtypes of the features and of its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., D]."""
        weight = self.weight.float()
        return rms_norm(x.float(), self.normalized_shape, weight, self.eps).to(x.dtype)


class PatchMerger(Connector):
    """An RMSNorm, a matrix that joins each square of factor x factor tokens into one, and an MLP.

    As transformers' `Mistral3MultiModalProjector`. The tokens of a square stand together
    (`vlm_tune/data/images/patches.py`).
    """

    def __init__(self, config: PatchMergerConnector, width: int, llm_width: int) -> None:
        super().__init__()
        self.factor = config.factor
        self.norm = Norm(width, config.eps)
        self.merging = nn.Linear(width * config.factor**2, width, bias=False)
        self.layers = mlp(width, llm_width, 2, config.bias)

    def tokens(self, tower_tokens: int) -> int:
        """The largest image's tokens divided by factor²."""
        side = square(tower_tokens, "patch_merger")
        if side % self.factor:
            raise ModelError(
                f"squares of {self.factor} x {self.factor} patches do not divide the tower's grid "
                f"of {side} x {side}: set model.tower.image_size to a multiple of "
                f"{self.factor} patches"
            )
        return (side // self.factor) ** 2

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[M, N, D] to [M, N / factor², E]."""
        squares = self.norm(features).unflatten(1, (-1, self.factor**2))
        # transformers' `unfold` has a square's values by channel.
        return self.layers(self.merging(squares.transpose(2, 3).flatten(2)))
