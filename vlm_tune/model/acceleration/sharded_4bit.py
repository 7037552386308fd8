"""Linear layers in 4 bits for the engines that shard weights (FSDP2, ZeRO-3).

bitsandbytes' layer has its codes in a parameter and their block scales beside it, in an attribute
that no engine shards, and that a gathered copy of the codes does not have. Here both are parameters
of bytes: engines shard bytes as any other numbers, and cast none of them.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import dequantize_blockwise
from torch import nn

from vlm_tune.kernels.traceable import packed_linear
from vlm_tune.model.acceleration.lora_layers import LoraLinear, Packed, compute_dtype

KINDS = ("nf4", "fp4")


class Sharded4bit(nn.Module):
    """A frozen linear layer whose codes and block scales are parameters of bytes.

    Attributes:
        weight: the codes as bitsandbytes packs them, two a byte, [O I / 2, 1].
        scales: the bytes of the fp32 scales, four for each block of weights.
        packing: the kind of codes and the block's size, as in `nf4:64`.
    """

    def __init__(self, layer: Any) -> None:
        """Takes over the weight of bitsandbytes' `Linear4bit`, or of its stand-in without weights.

        Scales that are quantised, as in a checkpoint with double quantisation, become fp32: those
        of the stand-in are, and every rank needs as many bytes.
        """
        super().__init__()
        self.in_features: int = layer.in_features
        self.out_features: int = layer.out_features
        state = layer.weight.quant_state
        self.packing = f"{state.quant_type}:{state.blocksize}"
        codes = layer.weight.data.as_subclass(torch.Tensor)
        self.weight = nn.Parameter(codes, requires_grad=False)
        scales = state.absmax
        if getattr(state, "nested", False):
            scales = dequantize_blockwise(scales, state.state2) + state.offset
        self.scales = nn.Parameter(scales.view(torch.uint8), requires_grad=False)
        self.bias: nn.Parameter | None = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs [..., O] for x [..., I], in the type of x."""
        rows = x.reshape(-1, self.in_features).to(compute_dtype(x))
        # The parameters themselves, no views of them: ZeRO-3 releases what it gathered for the
        # forward pass, and gathers it again into the parameters that the backward pass reads.
        weights = [self.weight, self.scales]
        out = packed_linear(rows, weights, self.packing, [self.out_features], None)
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)


def replace_4bit_layers(model: nn.Module) -> None:
    """Replaces a model's layers in 4 bits, or their stand-ins, by `Sharded4bit`.

    Call it before an engine shards the model, on every rank.
    """
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            # PEFT's layers are no `nn.Linear`, though they show the weight of the one inside.
            if not isinstance(layer, nn.Linear):
                continue
            state = getattr(layer.weight, "quant_state", None)
            if state is None or state.quant_type not in KINDS:
                continue
            sharded = Sharded4bit(layer)
            setattr(parent, name, sharded)
            if isinstance(parent, LoraLinear):
                parent.packed = Packed(None, None, sharded.packing)
