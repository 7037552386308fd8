"""A decoder layer's weights and sizes, laid out as the struct that its kernel reads."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from vlm_tune.kernels.cpu import native
from vlm_tune.kernels.lora_linear import Adapters, joined_weights
from vlm_tune.model.acceleration.lora_layers import operands
from vlm_tune.model.acceleration.mlp import gated_operands, gated_weights

NORMS = ("input_layernorm", "post_attention_layernorm")
SIZES = (
    "width",
    "heads",
    "groups",
    "head_width",
    "inner",
    "activation",
    "ranks",
    "ranks_out",
    "ranks_gated",
    "ranks_down",
)
STRIDES = ("merged_stride", "out_stride", "gate_stride", "up_stride", "down_stride")
POINTERS = (
    "merged",
    "out",
    "gate",
    "up",
    "down",
    "bias",
    "bias_out",
    "norm",
    "norm_of_middle",
    "adapters",
    "adapters_out",
    "adapters_gated",
)


class _Decoder(ctypes.Structure):
    """A layer's sizes, strides and addresses: the C struct that the kernel reads."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (*SIZES, *STRIDES)),
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_float) for name in ("epsilon", "epsilon_of_middle", "scale")),
    )


class Prepared:
    """A layer's weights and sizes, laid out for the kernel.

    `adapted` lists the LoRA A of its seven linear layers, then their B.
    """

    def __init__(self, layer: Any, x: Tensor) -> None:
        attention = layer.self_attn
        first, second = (layer._modules[name] for name in NORMS)
        *inner, outer = layer.projections()
        merged = attention.q_proj.siblings
        self.inner = operands(inner, x.dtype, merged and merged.matrix)
        self.outer = operands([outer], x.dtype)
        self.gated = gated_operands(layer.mlp.layers())
        parts = self.inner, self.outer, self.gated
        self.adapted = [
            *(down for of in parts for down in of.downs),
            *(up for of in parts for up in of.ups),
        ]
        self.numbers = sum(each.numel() for each in self.adapted)
        # Kept alive: `structure` holds their addresses.
        self.addressed = (
            [Adapters(of.downs, of.ups, of.scales) for of in parts],
            first.weight,
            second.weight,
        )
        inner, outer, gated = self.addressed[0]
        heads = self.outer.downs[0].shape[1] // attention.head_dim
        groups = len(self.inner.ups[1]) // attention.head_dim
        down = gated.downs[2]
        shape = (
            x.shape[-1],
            heads,
            groups,
            attention.head_dim,
            down.shape[1],
            layer.mlp.activation,
        )
        ranks = inner.rank, outer.rank, gated.rank - len(down), len(down)
        adapters = (ctypes.addressof(each.array) for each in (inner, outer, gated))
        addresses = [
            native.address(each)
            for each in (self.inner.bias, self.outer.bias, first.weight, second.weight)
        ]
        epsilons = first.variance_epsilon, second.variance_epsilon
        self.structure = _Decoder(
            *shape,
            *ranks,
            *[0] * len(STRIDES),
            *[None] * 5,
            *addresses,
            *adapters,
            *epsilons,
            attention.scaling,
        )
        self.address = ctypes.c_void_p(ctypes.addressof(self.structure))
        self.weights: list[Tensor] = []
        if not self.inner.packing:
            self.place(x)

    def __reduce__(self) -> tuple[Any, ...]:
        # Addresses are of no use to a copy of the layer.
        return type(None), ()

    def place(self, x: Tensor) -> None:
        """Writes the weights' addresses to `structure`; packed ones are unpacked for one pass."""
        inner = self.inner
        outer = self.outer
        gated = self.gated
        heads = outer.downs[0].shape[1]
        self.weights = [
            joined_weights(inner.weights, inner.packing, inner.room, inner.ups, x, x.shape[-1]),
            joined_weights(outer.weights, outer.packing, outer.room, outer.ups, x, heads),
            *gated_weights(gated.weights, gated.packing, gated.ups, gated.downs, x),
        ]
        for name, stride, weight in zip(POINTERS, STRIDES, self.weights, strict=False):
            setattr(self.structure, name, native.address(weight))
            setattr(self.structure, stride, weight.stride(0))

    @contextmanager
    def placed(self, x: Tensor) -> Iterator[None]:
        """Unpacks 4-bit weights for the context, and drops them after it."""
        if self.inner.packing:
            self.place(x)
        yield
        if self.inner.packing:
            self.weights = []
