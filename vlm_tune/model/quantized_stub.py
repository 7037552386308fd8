"""Stand-ins for quantised layers, without weights: the same bytes and the same temporaries."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from vlm_tune.compat import fp32_layers

BLOCK = 64
"""Weights per fp32 scale in nf4 and fp4, as in bitsandbytes."""


class _Unpacked(torch.autograd.Function):
    """A linear layer that unpacks its weight in the forward pass and again in the backward pass.

    Neither pass keeps the unpacked weight.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        ctx.shape = shape
        return linear(rows, rows.new_empty(shape))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] @ gradients[0].new_empty(ctx.shape), None


class PackedLinear(nn.Linear):
    """A frozen linear layer with nf4, fp4 or int8 weights on the meta device."""

    def __init__(self, layer: nn.Linear, quantize: str) -> None:
        nn.Module.__init__(self)
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.bias = layer.bias
        self.dtype = layer.weight.dtype
        count = layer.weight.numel()
        # 4 bits: half a byte per weight and a scale per block; int8: a byte per weight, a scale per
        # row.
        size, scales = (
            (count, self.out_features)
            if quantize == "int8"
            else (-(-count // 2), -(-count // BLOCK))
        )
        weight: Any = nn.Parameter(
            torch.empty(size, 1, dtype=torch.uint8, device="meta"), requires_grad=False
        )
        self.weight = weight
        absmax = torch.empty(scales, dtype=torch.float32, device="meta")
        weight.quant_state = SimpleNamespace(
            shape=(self.out_features, self.in_features),
            quant_type=quantize,
            blocksize=BLOCK,
            absmax=absmax,
        )
        self.register_buffer("scales", absmax, persistent=False)

    @property
    def W_q(self) -> torch.Tensor:  # noqa: N802 - the name that PEFT has
        """The codes, by the name from which PEFT's DoRA knows that a layer has `dequantize`."""
        return self.weight

    def dequantize(self) -> torch.Tensor:
        """An empty weight [O, I], of the type that the layer was packed from."""
        return self.weight.new_empty(self.out_features, self.in_features, dtype=self.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output: Any = _Unpacked.apply(input.to(self.dtype), (self.out_features, self.in_features))
        output = output if self.bias is None else output + self.bias
        return output.to(input.dtype)


def pack_linears(model: nn.Module, quantize: str, *, keep: nn.Module) -> None:
    """Replaces every linear layer by a `PackedLinear`.

    Exceptions are `keep` and the layers that transformers keeps in fp32.
    """
    fp32_names = fp32_layers(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child is not keep and name not in fp32_names:
                setattr(module, name, PackedLinear(child, quantize))
