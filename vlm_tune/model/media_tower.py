"""Base class of the towers, whatever they take: a batch of inputs in, features out."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn


class MediaTower(nn.Module):
    """Base class of the towers: a batch of inputs [B, ...] in, features [B, N, D] out.

    `rebuild` is the description from which `build_tower` makes the same architecture without its
    weights. `input_shape` and `input_dtype` are those of one input.
    """

    rebuild: dict[str, Any]
    input_shape: tuple[int, ...]
    input_dtype: torch.dtype
    measured: tuple[int, int] | None = None
    keeps_shape = False
    """Whether it takes images of any shape, as patches with their places
    (`vlm_tune/data/images/patches.py`)."""

    def __init__(self, *, is_pretrained: bool) -> None:
        super().__init__()
        self.is_pretrained = is_pretrained

    def train(self, mode: bool = True) -> Self:
        """Sets the mode as in torch, but batch norms of a pretrained tower stay in eval mode.

        Statistics of a few images are worse than those they bring, and make a row's loss depend on
        the rows beside it.
        """
        super().train(mode)
        if mode and self.is_pretrained:
            for module in self.modules():
                if getattr(module, "running_mean", None) is not None:
                    module.eval()
        return self

    def blank(self, device: torch.device) -> torch.Tensor:
        """One input of zeros."""
        return torch.zeros(1, *self.input_shape, dtype=self.input_dtype, device=device)

    def measure(self) -> tuple[int, int]:
        """(tokens per input, width), measured with a blank one.

        The result is cached, because one rank alone can't run a sharded tower.
        """
        if self.measured:
            return self.measured
        parameter = next(self.parameters())
        was = self.training
        with torch.no_grad():
            _, tokens, width = self.eval()(self.blank(parameter.device)).shape
        self.train(was)
        self.measured = tokens, width
        return self.measured
