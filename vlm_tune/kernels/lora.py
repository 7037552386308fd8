"""The custom operator of fused LoRA layers: y = x W^T + b + x A^T (s B)^T, forward and backward.

torch.compile sees one operator, so it fuses the code around it and the matrix products stay few and
large. On a CPU with AMX, in bf16, each pass is one kernel of our own (`low_rank.cpp`).

Shapes: T tokens, I inputs, O outputs, R the rank. Several layers that read the same x are computed
as one: O and R are then sums over the layers, A is stacked, and B is block diagonal, each block
mapping a layer's ranks to its outputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from vlm_tune.kernels.cpu import native
from vlm_tune.kernels.devices import check_devices
from vlm_tune.kernels.operator import operator

LARGE = 4096
"""Number of inputs or outputs of a layer above which the kernel reads its rows too often."""

NO_NORM = ctypes.c_float(0)
"""The epsilon that is passed to a kernel if there is no norm."""

TOGETHER = 2048
"""Most outputs that the kernel's backward pass computes at once; more are split by layer."""


def parts(sizes: Sequence[int]) -> list[slice]:
    """Consecutive slices of these sizes, starting at 0."""
    return [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]


def wide_rank(rank: int) -> int:
    """R rounded up to a multiple of 8, padded with zeros.

    Rows of a matrix [O, I + R] are then multiples of 16 bytes, which GPU kernels need.
    """
    return -(-rank // 8) * 8


def _down(downs: Sequence[Tensor], rank: int, dtype: torch.dtype) -> Tensor:
    """A [R, I] of all layers, with rows of zeros up to `rank`."""
    if len(downs) == 1 and len(downs[0]) == rank:
        return downs[0].to(dtype)
    return torch.cat(
        [*downs, downs[0].new_zeros(rank - sum(map(len, downs)), downs[0].shape[1])]
    ).to(dtype)


def _fill(tail: Tensor, ups: Sequence[Tensor], scales: Sequence[float]) -> None:
    """Writes the scaled B of each layer into its own rows and columns of `tail` [O, R]."""
    for up, scale, rows, ranks in zip(
        ups, scales, parts([len(up) for up in ups]), parts([up.shape[1] for up in ups]), strict=True
    ):
        tail[rows, ranks].copy_(up * scale)


def unpacked(
    codes: Tensor, scales: Tensor, packing: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Dequantises a weight's 4-bit codes and block scales.

    `packing` is the kind of codes and their block size (nf4:64). The scales are fp32 numbers, or
    the bytes of such, which an engine that shards them does not round.
    """
    import bitsandbytes  # noqa: F401 - registers the operator

    kind, block = packing.split(":")
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float32)
    return torch.ops.bitsandbytes.dequantize_4bit(
        codes, scales, int(block), kind, list(shape), dtype
    )


def joined_weights(
    weights: Sequence[Tensor],
    packing: str,
    room: int,
    ups: Sequence[Tensor],
    like: Tensor,
    width: int,
) -> Tensor:
    """The matrix [W | room for s B] of shape [O, I + room], dequantised if `packing` is set."""
    if not packing:
        return weights[0]
    matrix = like.new_zeros(sum(map(len, ups)), width + room) if room else None
    for codes, scales, up, rows in zip(
        weights[::2], weights[1::2], ups, parts([len(up) for up in ups]), strict=True
    ):
        weight = unpacked(codes, scales, packing, (len(up), width), like.dtype)
        if matrix is None:
            return weight
        matrix[rows, :width].copy_(weight)
    assert matrix is not None
    return matrix


def _operands_reason(
    dtype: torch.dtype, device: torch.device, inputs: int, outputs: Sequence[int]
) -> str | None:
    """The reason why the kernel is not for such layers, whether it is there or not."""
    if device.type != "cpu":
        return f"the LoRA kernel is for CPUs, not {device.type}"
    if dtype != torch.bfloat16:
        return f"the LoRA kernel computes in bf16, not {dtype}"
    if max(inputs, *outputs) > LARGE:
        return f"a layer has {max(inputs, *outputs):,} inputs or outputs, more than {LARGE:,}"
    return None


def unsupported_reason(
    dtype: torch.dtype, device: torch.device, inputs: int, outputs: Sequence[int]
) -> str | None:
    """The reason why the kernel does not compute layers; None if it does.

    Args:
        dtype: The type to compute in.
        device: The weights' device.
        inputs: I.
        outputs: The number of outputs of each layer.
    """
    return _operands_reason(dtype, device, inputs, outputs) or native.unavailable_reason()


def by_kernel(rows: Tensor, outputs: Sequence[int]) -> bool:
    """Whether the kernel computes layers with these numbers of outputs for such rows [T, I]."""
    reason = _operands_reason(rows.dtype, rows.device, rows.shape[1], outputs)
    return reason is None and native.has_kernels()


def rows_of(tensor: Tensor) -> Tensor:
    """A matrix with contiguous rows, as the kernels need it."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def sizes(*values: int) -> Any:
    """Integers as a C array."""
    return (ctypes.c_int64 * len(values))(*values)


class _Layer(ctypes.Structure):
    """The kernel's struct of one adapter."""

    _fields_ = (
        ("down", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("scale", ctypes.c_float),
    )


class Adapters:
    """A and B of layers in fp32 and their scales, in the form that the kernels take."""

    def __init__(
        self, downs: Sequence[Tensor], ups: Sequence[Tensor], scales: Sequence[float]
    ) -> None:
        self.downs, self.ups = (
            [each.float().contiguous() for each in some] for some in (downs, ups)
        )
        self.rank, self.outputs = sum(map(len, self.downs)), sum(map(len, self.ups))
        layers = [
            _Layer(native.address(down), native.address(up), *up.shape, scale)
            for down, up, scale in zip(self.downs, self.ups, scales, strict=True)
        ]
        self.array = (_Layer * len(layers))(*layers)


def by_layer(flat: Tensor, layers: Sequence[Tensor]) -> list[Tensor]:
    """Splits concatenated gradients into those of each layer's A or B, in its type."""
    split = flat.split([each.numel() for each in layers])
    return [part.view_as(each).to(each.dtype) for part, each in zip(split, layers, strict=True)]


def _quick(
    rows: Tensor, weight: Tensor, bias: Tensor | None, adapters: Adapters
) -> tuple[Tensor, Tensor]:
    """The outputs [T, O] of rows [T, I] and x A^T [T, R], computed by the kernel."""
    count, width = rows.shape
    out = rows.new_empty(count, adapters.outputs)
    low = rows.new_empty(count, adapters.rank)
    shape = sizes(
        count,
        width,
        adapters.outputs,
        adapters.rank,
        rows.stride(0),
        weight.stride(0),
        len(adapters.ups),
    )
    native.kernels().low_rank(
        shape,
        adapters.array,
        *native.pointers(rows, None),
        NO_NORM,
        *native.pointers(None, weight, bias, None, out, low),
    )
    return out, low


def _quick_backward(
    gradient: Tensor, rows: Tensor, low: Tensor, weight: Tensor, adapters: Adapters, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `lora_linear_backward`, computed by the kernel.

    Those of A and B are in fp32, those of B concatenated.
    """
    count, width = rows.shape
    x_gradient = gradient.new_empty(count if needs_x else 0, width)
    of_downs = gradient.new_empty(adapters.rank, width, dtype=torch.float32)
    of_ups = gradient.new_empty(sum(up.numel() for up in adapters.ups), dtype=torch.float32)
    strides = (gradient.stride(0), rows.stride(0), weight.stride(0))
    native.kernels().low_rank_backward(
        sizes(count, width, adapters.outputs, adapters.rank, *strides, len(adapters.ups), TOGETHER),
        adapters.array,
        *native.pointers(
            gradient,
            rows,
            None,
            None,
            None,
            low,
            weight,
            x_gradient if needs_x else None,
            of_downs,
            of_ups,
        ),
    )
    return x_gradient, of_downs, of_ups


@operator("lora_linear")
def lora_linear(
    rows: Tensor,
    weights: Sequence[Tensor],
    packing: str,
    room: int,
    quick: bool,
    bias: Tensor | None,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """The outputs [T, O] of rows [T, I], and x A^T [T, R], which the backward pass needs.

    Args:
        rows: x [T, I].
        weights: W [O, I] of one layer (`room` 0), or [W | room for s B] of shape [O, I + room],
            with which all is one GEMM of [x | x A^T]. With a `packing`, the codes and block scales
            of each layer, which are dequantised in either pass and saved by neither.
        packing: kind and block size of 4-bit codes (as nf4:64), or an empty string.
        room: columns for s B beside W; x A^T then has as many, instead of R.
        quick: whether the kernel computes it. It leaves `room` unused and returns x A^T [T, R].
        bias: [O].
        downs: A of each layer.
        ups: B of each layer.
        scales: s of each layer.
    """
    check_devices("lora_linear", (rows, *weights, *downs, *ups, bias))
    width = rows.shape[1]
    matrix = joined_weights(weights, packing, room, ups, rows, width)
    if quick:
        return _quick(rows_of(rows), matrix, bias, Adapters(downs, ups, scales))
    if not room:
        low = rows @ downs[0].to(rows.dtype).t()
        return linear(rows, matrix, bias).addmm_(low, (ups[0] * scales[0]).to(rows.dtype).t()), low
    # `.data` hides this write from torch.compile. It is safe: the frozen columns do not change,
    # each pass writes the others before it reads them, and threads write the same numbers.
    _fill(matrix.data[:, width:], ups, scales)
    low = rows @ _down(downs, room, rows.dtype).t()
    return linear(torch.cat([rows, low], 1), matrix, bias), low


@lora_linear.register_fake
def _(
    rows: Tensor,
    weights: Any,
    packing: str,
    room: int,
    quick: bool,
    bias: Tensor | None,
    downs: Any,
    ups: Any,
    scales: Any,
) -> tuple[Tensor, Tensor]:
    check_devices("lora_linear", (rows, *weights, *downs, *ups, bias))
    ranks = room if room and not quick else sum(map(len, downs))
    return rows.new_empty(rows.shape[0], sum(len(up) for up in ups)), rows.new_empty(
        rows.shape[0], ranks
    )


@operator("lora_linear_backward")
def lora_linear_backward(
    gradient: Tensor,
    rows: Tensor,
    low: Tensor,
    weights: Sequence[Tensor],
    packing: str,
    room: int,
    quick: bool,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x [T, I], of A [R, I] and of s B as [R, O], from that of the outputs [T, O].

    The gradient of x has no rows unless `needs_x`. With `quick` the last is of each layer's own B
    [O_i, R_i] instead of s B, concatenated. `low` is x A^T, the other arguments are those of
    `lora_linear`.
    """
    width = downs[0].shape[1]
    matrix = joined_weights(weights, packing, room, ups, low, width)
    if quick:
        return _quick_backward(
            rows_of(gradient), rows_of(rows), low, matrix, Adapters(downs, ups, scales), needs_x
        )
    if room:
        # With s B beside W one GEMM gives the gradients through both.
        _fill(matrix.data[:, width:], ups, scales)
        both = gradient @ matrix if needs_x else None
        x_gradient, low_gradient = (
            (None, gradient @ matrix[:, width:])
            if both is None
            else (both[:, :width], both[:, width:])
        )
    else:
        low_gradient = gradient @ (ups[0] * scales[0]).to(low.dtype)
        x_gradient = gradient @ matrix if needs_x else None
    if x_gradient is None:
        x_gradient = gradient.new_empty(0, width)
    else:
        x_gradient.addmm_(low_gradient, _down(downs, low.shape[1], low.dtype))
    return x_gradient, low_gradient.t() @ rows, low.t() @ gradient


@lora_linear_backward.register_fake
def _(
    gradient: Tensor,
    rows: Any,
    low: Tensor,
    weights: Any,
    packing: str,
    room: int,
    quick: bool,
    downs: Any,
    ups: Any,
    scales: Any,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    width = downs[0].shape[1]
    if quick:
        of_downs = gradient.new_empty(low.shape[1], width, dtype=torch.float32)
        of_ups = gradient.new_empty(sum(up.numel() for up in ups), dtype=torch.float32)
        return gradient.new_empty(gradient.shape[0] if needs_x else 0, width), of_downs, of_ups
    rank = low.shape[1]
    count = gradient.shape[0]
    return (
        gradient.new_empty_strided((count, width), (width + room, 1))
        if needs_x
        else gradient.new_empty(0, width),
        gradient.new_empty(rank, width),
        gradient.new_empty(rank, gradient.shape[1]),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    rows, weights, ctx.packing, ctx.room, ctx.quick, _, downs, ups, ctx.scales = inputs
    ctx.counts = len(weights), len(downs)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(rows, output[1], *weights, *downs, *ups)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Any, ...]:
    rows, low, *rest = ctx.saved_tensors
    count, layers = ctx.counts
    weights = rest[:count]
    downs = rest[count : count + layers]
    ups = rest[count + layers :]
    needs_x = ctx.needs_input_grad[0]
    x, down, up = lora_linear_backward(
        gradient,
        rows,
        low,
        weights,
        ctx.packing,
        ctx.room,
        ctx.quick,
        downs,
        ups,
        ctx.scales,
        needs_x,
    )
    ranks = parts([len(each) for each in downs])
    outputs = parts([len(each) for each in ups])
    of_downs = [down[rank].to(each.dtype) for rank, each in zip(ranks, downs, strict=True)]
    if ctx.quick:
        of_ups = by_layer(up, ups)
    else:
        of_ups = [
            (up[rank, where].t().to(each.dtype) * scale).contiguous()
            for rank, where, each, scale in zip(ranks, outputs, ups, ctx.scales, strict=True)
        ]
    return x if needs_x else None, [None] * count, None, None, None, None, of_downs, of_ups, None


lora_linear.register_gradient(_backward, _save)
