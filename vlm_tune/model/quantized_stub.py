"""Layers that stand for quantised ones where no weights are: as many bytes, and the same temporaries."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

BLOCK = 64
"""Weights that share one fp32 scale in nf4, as bitsandbytes has it."""


class _Unpacked(torch.autograd.Function):
    """A linear layer whose weight is unpacked in the forward pass and again in the backward pass, and kept by neither."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        ctx.shape = shape
        return linear(rows, rows.new_empty(shape))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] @ gradients[0].new_empty(ctx.shape), None


class PackedLinear(nn.Linear):
    """A frozen linear layer of nf4 or int8 weights, without their values."""

    def __init__(self, layer: nn.Linear, quantize: str) -> None:
        nn.Module.__init__(self)
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.bias = layer.bias
        self.dtype = layer.weight.dtype
        count = layer.weight.numel()
        # Half a byte and a scale a block, or a byte and a scale a row.
        size, scales = (
            (-(-count // 2), -(-count // BLOCK))
            if quantize == "nf4"
            else (count, self.out_features)
        )
        weight: Any = nn.Parameter(
            torch.empty(size, 1, dtype=torch.uint8, device="meta"), requires_grad=False
        )
        self.weight = weight
        weight.quant_state = SimpleNamespace(shape=(self.out_features, self.in_features))
        self.register_buffer(
            "scales", torch.empty(scales, dtype=torch.float32, device="meta"), persistent=False
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        found: Any = _Unpacked.apply(input.to(self.dtype), (self.out_features, self.in_features))
        found = found if self.bias is None else found + self.bias
        return found.to(input.dtype)


def pack_linears(model: nn.Module, quantize: str, *, keep: nn.Module) -> None:
    """Puts a `PackedLinear` in the place of every linear layer except `keep`, and those that transformers keeps as they are."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child is not keep and name not in kept:
                setattr(module, name, PackedLinear(child, quantize))
