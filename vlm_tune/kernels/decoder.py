"""The operator of decoder layers: h = x + attention(norm(x)), y = h + mlp(norm(h)).

The weights are frozen, and all seven linear layers have LoRA. Between the kernels of projections,
attention and the MLP (`decoder.cpp`) nothing is left to compute, so nothing is written to memory
that a later pass does not read. It computes in bf16 on a CPU alone; `reference_decoder` is the same
by torch's operators.

Shapes: B rows, L tokens, T = B L, E width, H query heads, G key heads, D head width, F intermediate
width, O = (H + 2G) D.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from vlm_tune.kernels import attention
from vlm_tune.kernels.cpu import native
from vlm_tune.kernels.devices import check_devices
from vlm_tune.kernels.lora import TOGETHER, Adapters, by_layer, joined_weights
from vlm_tune.kernels.mlp import gated_weights
from vlm_tune.kernels.version import VERSION


def unsupported_reason(dtype: torch.dtype, device: torch.device, head_width: int) -> str | None:
    """The reason why the kernel does not compute layers with heads of D = `head_width`, or None."""
    return attention.unsupported_reason(dtype, device, head_width) or native.unavailable_reason()


INNER = slice(0, 3)
"""The places of q, k and v among the seven linear layers."""
OUTER = slice(3, 4)
GATED = slice(4, 7)
LINE = 64
"""Bytes of a cache line, to which each saved tensor is aligned."""

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


@dataclass(eq=False)
class Operands:
    """A layer's weights and settings, laid out for the kernel once for many calls.

    Some thirty tensors as arguments of an operator would cost as much time as a small layer's
    kernel takes. So the operators get the layer's `handle`. Addresses and settings never change;
    what LoRA learns is read from where it lies.

    Attributes:
        weights: [W of q, k, v | room for s B] [O, E + room], W of o [E, H D], gate and up [F, E]
            and down [E, F]; with a `packing` the codes and block scales of all seven layers.
        packing: The kind and block size of 4-bit codes, as in `nf4:64`, or an empty string.
        room: Columns for s B beside the weights of q, k and v.
        bias: Of q, k and v [O].
        bias_out: Of o [E].
        norms: The weights [E] of the two norms.
        downs: LoRA A of q, k, v, o, gate, up and down, in fp32.
        ups: Their B.
        scales: The factor of each B.
        head_width: D.
        activation: The index in `ACTIVATIONS`.
        epsilons: Of the two norms.
        scale: The factor of attention scores.
    """

    weights: Sequence[Tensor]
    packing: str
    room: int
    bias: Tensor | None
    bias_out: Tensor | None
    norms: Sequence[Tensor]
    downs: Sequence[Tensor]
    ups: Sequence[Tensor]
    scales: Sequence[float]
    head_width: int
    activation: int
    epsilons: Sequence[float]
    scale: float

    _numbers: ClassVar = itertools.count(1)
    _open: ClassVar[WeakValueDictionary[int, Operands]] = WeakValueDictionary()

    def __post_init__(self) -> None:
        self.handle = next(self._numbers)
        self._open[self.handle] = self
        self._addressed: _Addressed | None = None
        check_devices("decoder_layer", (*self.weights, *self.norms, *self.downs, *self.ups))

    def __reduce__(self) -> tuple[Any, ...]:
        # Handles and addresses are of no use to a copy of the layer.
        return type(None), ()

    @classmethod
    def of(cls, handle: int) -> Operands:
        """The operands with this handle. Raises `KeyError` if they are not in use any more."""
        return cls._open[handle]

    def addressed(self, x: Tensor) -> _Addressed:
        """The C struct of one pass. Packed weights are unpacked for it, in x's type."""
        if self.packing:
            return _Addressed(self, self.matrices(x), x.shape[2])
        if self._addressed is None:
            self._addressed = _Addressed(self, self.matrices(x), x.shape[2])
        return self._addressed

    @property
    def adapted(self) -> list[Tensor]:
        """All A, then all B: what gets gradients."""
        return [*self.downs, *self.ups]

    @property
    def heads(self) -> int:
        """H."""
        return self.downs[3].shape[1] // self.head_width

    @property
    def groups(self) -> int:
        """G."""
        return len(self.ups[1]) // self.head_width

    def matrices(self, like: Tensor) -> list[Tensor]:
        """The five weights, unpacked for one pass if they are in 4 bits."""
        of_inner, of_outer, of_gated = (
            (slice(0, 6), slice(6, 8), slice(8, 14))
            if self.packing
            else (slice(0, 1), slice(1, 2), slice(2, 5))
        )
        width = like.shape[-1]
        ups = self.ups
        return [
            joined_weights(
                self.weights[of_inner], self.packing, self.room, ups[INNER], like, width
            ),
            joined_weights(
                self.weights[of_outer],
                self.packing,
                0,
                ups[OUTER],
                like,
                self.heads * self.head_width,
            ),
            *gated_weights(
                self.weights[of_gated], self.packing, ups[GATED], self.downs[GATED], like
            ),
        ]


class _Addressed:
    """The C struct of a layer for one pass, and what keeps its addresses valid."""

    def __init__(self, of: Operands, matrices: Sequence[Tensor], width: int) -> None:
        self.adapters = [
            Adapters(of.downs[part], of.ups[part], of.scales[part])
            for part in (INNER, OUTER, GATED)
        ]
        inner, outer, gated = self.adapters
        of_down = len(of.downs[6])
        vectors = (of.bias, of.bias_out, *of.norms)
        self.matrices = list(matrices)
        self.vectors = vectors
        self.structure = _Decoder(
            width,
            of.heads,
            of.groups,
            of.head_width,
            of.downs[6].shape[1],
            of.activation,
            inner.rank,
            outer.rank,
            gated.rank - of_down,
            of_down,
            *(matrix.stride(0) for matrix in matrices),
            *map(native.address, matrices),
            *map(native.address, vectors),
            *(ctypes.addressof(each.array) for each in self.adapters),
            *of.epsilons,
            of.scale,
        )
        self.pointer = ctypes.c_void_p(ctypes.addressof(self.structure))


def saved_bytes(of: Operands, rows: int, length: int, *, keep: bool) -> int:
    """The size of what the kernel saves for B rows of L tokens; `keep` as in `decoder_layer`.

    It is `decoder_room` of `decoder.cpp`, for shapes alone; a test compares them.
    """
    count = rows * length
    whole = -(-count // 32) * 32
    ranks = [len(down) for down in of.downs]
    heads = of.heads * of.head_width
    merged = (of.heads + 2 * of.groups) * of.head_width
    width = of.downs[0].shape[1]
    half = [count * each for each in (merged, heads, width, sum(ranks[INNER]), ranks[3])]
    sizes = [2 * each for each in half]
    sizes += [4 * rows * of.heads * length, 4 * count, 4 * count]
    if keep:
        inner = of.downs[6].shape[1]
        sizes += [2 * whole * 2 * inner, 2 * count * (ranks[4] + ranks[5]), 2 * count * ranks[6]]
    return sum(-(-size // LINE) * LINE for size in sizes)


def _scratch(of: Operands, x: Tensor) -> Tensor:
    """Memory of the backward pass alone (`decoder_scratch` of `decoder.cpp`)."""
    heads = of.heads * of.head_width
    merged = heads + 2 * of.groups * of.head_width
    count = x.shape[0] * x.shape[1]
    return x.new_empty(2 * count * (x.shape[2] + heads + merged), dtype=torch.uint8)


def _new(x: Tensor, of: Operands, keep: bool) -> tuple[Tensor, Tensor]:
    """Empty outputs [B, L, E] and saved bytes."""
    size = saved_bytes(of, x.shape[0], x.shape[1], keep=keep)
    return torch.empty_like(x), x.new_empty(size, dtype=torch.uint8)


@torch.library.custom_op(f"vlm_tune::decoder_layer_{VERSION}", mutates_args=(), device_types="cpu")
def forward_pass(
    x: Tensor, cos: Tensor, sin: Tensor, visible_until: Tensor, operands: int, keep: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A decoder layer's output.

    Args:
        x: bf16 [B, L, E], contiguous.
        cos: Rotary table, bf16 [B, L, D], contiguous.
        sin: The other table.
        visible_until: int32[B, L], see `interval_attention`.
        operands: The handle of the layer's `Operands`.
        keep: Whether a backward pass follows.

    Returns:
        The output [B, L, E]; the bytes that the backward pass needs; and the memory of this pass
        alone (unpacked weights), so that a trace of shapes counts it.
    """
    of = Operands.of(operands)
    addressed = of.addressed(x)
    out, saved = _new(x, of, keep)
    native.kernels().decoder(
        addressed.pointer,
        *x.shape[:2],
        keep,
        *native.pointers(x, cos, sin, visible_until, out, saved),
    )
    return out, saved, addressed.matrices if of.packing else []


@forward_pass.register_fake
def _(
    x: Tensor, cos: Tensor, sin: Tensor, visible_until: Tensor, operands: int, keep: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    of = Operands.of(operands)
    return *_new(x, of, keep), of.matrices(x) if of.packing else []


@torch.library.custom_op(
    f"vlm_tune::decoder_layer_backward_{VERSION}", mutates_args=(), device_types="cpu"
)
def backward_pass(
    gradient: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    visible_until: Tensor,
    saved: Tensor,
    operands: int,
    needs_x: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The gradients of a decoder layer, given that of its output, [B, L, E].

    `saved` are the bytes that `forward_pass` returned; the other operands are its own.

    Returns:
        The gradient of x [B, L, E], or empty if not needed; in fp32 those of all A, then of all B,
        flattened; and the memory of this pass alone.
    """
    of = Operands.of(operands)
    addressed = of.addressed(x)
    of_x, gradients = _gradients(x, of, needs_x)
    scratch = _scratch(of, x)
    native.kernels().decoder_backward(
        addressed.pointer,
        *x.shape[:2],
        TOGETHER,
        *native.pointers(
            gradient,
            x,
            cos,
            sin,
            visible_until,
            saved,
            scratch,
            of_x if needs_x else None,
            gradients,
        ),
    )
    return of_x, gradients, [scratch, *(addressed.matrices if of.packing else [])]


def _gradients(x: Tensor, of: Operands, needs_x: bool) -> tuple[Tensor, Tensor]:
    """Empty gradients of x and, flattened, of all A and B."""
    numbers = sum(each.numel() for each in of.adapted)
    of_x = torch.empty_like(x) if needs_x else x.new_empty(0)
    return of_x, x.new_empty(numbers, dtype=torch.float32)


@backward_pass.register_fake
def _(
    gradient: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    visible_until: Tensor,
    saved: Tensor,
    operands: int,
    needs_x: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    of = Operands.of(operands)
    unpacked = of.matrices(x) if of.packing else []
    return *_gradients(x, of, needs_x), [_scratch(of, x), *unpacked]


class _DecoderLayer(torch.autograd.Function):
    """The operators with their gradient; the last arguments are all A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        visible_until: Tensor,
        of: Operands,
        graph: bool,
        *_: Tensor,
    ) -> Tensor:
        keep = graph and any(ctx.needs_input_grad)
        out, saved, _unpacked = forward_pass(x, cos, sin, visible_until, of.handle, keep)
        if keep:
            ctx.of = of
            ctx.save_for_backward(x, cos, sin, visible_until, saved)
        return out

    @staticmethod
    def backward(ctx: Any, *flows: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        of: Operands = ctx.of
        needs_x = ctx.needs_input_grad[0]
        of_x, gradients, _memory = backward_pass(
            flows[0].contiguous(), *ctx.saved_tensors, of.handle, needs_x
        )
        of_adapted = by_layer(gradients, of.adapted)
        return of_x if needs_x else None, *(None,) * 5, *of_adapted


def decoder_layer(
    x: Tensor, cos: Tensor, sin: Tensor, visible_until: Tensor, of: Operands
) -> Tensor:
    """The output [B, L, E] of a decoder layer, with gradients for x and all LoRA weights.

    Args:
        x: bf16 [B, L, E], contiguous.
        cos: Rotary table, bf16 [B, L, D], contiguous.
        sin: The other table.
        visible_until: int32[B, L], see `interval_attention`.
        of: The layer's weights and settings.

    Raises:
        ValueError: The tensors are on several devices.
    """
    check_devices("decoder_layer", (x, cos, sin, visible_until, of.weights[0]))
    graph = torch.is_grad_enabled()
    hidden: Any = _DecoderLayer.apply(x, cos, sin, visible_until, of, graph, *of.adapted)
    return hidden
