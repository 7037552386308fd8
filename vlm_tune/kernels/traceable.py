"""LoRA layers in tensor code that a compiler traces, for devices without a kernel of our own.

y = x W^T + b + x A^T (s B)^T is one product with the frozen weight and two skinny ones. Autograd
saves x, which the layers of a group share, and x A^T; the frozen weight gets no gradient. As the
code is no operator, torch.compile fuses what stands around the products.

A weight in 4 bits is dequantised for one product at a time, in the forward pass and again in the
backward pass. That is an operator: a compiler would see that both passes dequantise the same codes,
do it once, and save the weight.

Shapes: T tokens, I inputs, O outputs, R the rank; of several layers that read the same x, O and R
are sums over the layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from vlm_tune.kernels.devices import check_devices
from vlm_tune.kernels.lora import parts, unpacked
from vlm_tune.kernels.operator import operator

NESTED = 3
"""Tensors by which the block scales of a double-quantised weight are dequantised."""


def traceable_lora(
    rows: Tensor,
    weights: Sequence[Tensor],
    packing: str,
    bias: Tensor | None,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
) -> Tensor:
    """The outputs [T, O] of rows x [T, I], with autograd's own gradient.

    Args:
        rows: x [T, I], in the type to compute in.
        weights: W [O, I], with a `packing` the tensors that `packed_linear` takes.
        packing: The kind of 4-bit codes and the block sizes, as nf4:64, or an empty string.
        bias: [O].
        downs: A of each layer.
        ups: B of each layer.
        scales: s of each layer.
    """
    base = (
        packed_linear(rows, weights, packing, [len(up) for up in ups], bias)
        if packing
        else linear(rows, weights[0], bias)
    )
    scaled = [up * scale for up, scale in zip(ups, scales, strict=True)]
    low = linear(rows, _whole(downs).to(rows.dtype))
    up = scaled[0] if len(scaled) == 1 else torch.block_diag(*scaled)
    # The base's product saves no output, so it may be added to in place.
    return base.addmm_(low, up.to(rows.dtype).t())


def _whole(downs: Sequence[Tensor]) -> Tensor:
    return downs[0] if len(downs) == 1 else torch.cat(list(downs))


# --- weights in 4 bits ----------------------------------------------------------------------------


def _dequantised(
    weights: Sequence[Tensor], packing: str, outputs: Sequence[int], width: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Yields each layer's place among the outputs and its weight [O_i, I], one after another.

    A weight is freed before the next is made, so that all take the same memory of torch's
    allocator.
    """
    kind, block, *outer = packing.split(":")
    each = 2 + NESTED * len(outer)
    for place, start in zip(parts(outputs), range(0, len(weights), each), strict=True):
        codes, scales, *nested = weights[start : start + each]
        if outer:
            code, outer_scales, offset = nested
            scales = offset + torch.ops.bitsandbytes.dequantize_blockwise(
                scales, outer_scales, code, int(outer[0]), torch.float32
            )
        shape = (place.stop - place.start, width)
        yield place, unpacked(codes, scales, f"{kind}:{block}", shape, dtype)


@operator("packed_linear")
def packed_linear(
    rows: Tensor,
    weights: Sequence[Tensor],
    packing: str,
    outputs: Sequence[int],
    bias: Tensor | None,
) -> Tensor:
    """The outputs [T, O] of frozen linear layers with weights in 4 bits, for rows [T, I].

    Args:
        rows: x [T, I].
        weights: Each layer's codes and block scales; where these are quantised too, they are
            followed by their code, their own block scales and their offset.
        packing: The kind of codes and their block size, as nf4:64; where the scales are quantised,
            the size of their blocks too, as nf4:64:256.
        outputs: The number of outputs of each layer.
        bias: [O].
    """
    check_devices("packed_linear", (rows, *weights, bias))
    out = rows.new_empty(rows.shape[0], sum(outputs))
    for place, weight in _dequantised(weights, packing, outputs, rows.shape[1], rows.dtype):
        if bias is None:
            torch.mm(rows, weight.t(), out=out[:, place])
        else:
            torch.addmm(bias[place], rows, weight.t(), out=out[:, place])
        del weight
    return out


@packed_linear.register_fake
def _(
    rows: Tensor, weights: Any, packing: str, outputs: Sequence[int], bias: Tensor | None
) -> Tensor:
    check_devices("packed_linear", (rows, *weights, bias))
    return rows.new_empty(rows.shape[0], sum(outputs))


@operator("packed_linear_backward")
def packed_linear_backward(
    gradient: Tensor, weights: Sequence[Tensor], packing: str, outputs: Sequence[int], width: int
) -> Tensor:
    """The gradient of x [T, I] from that of the outputs of `packed_linear` [T, O]."""
    of_x = gradient.new_empty(gradient.shape[0], width)
    for place, weight in _dequantised(weights, packing, outputs, width, gradient.dtype):
        if place.start == 0:
            torch.mm(gradient[:, place], weight, out=of_x)
        else:
            of_x.addmm_(gradient[:, place], weight)
        del weight
    return of_x


@packed_linear_backward.register_fake
def _(gradient: Tensor, weights: Any, packing: str, outputs: Sequence[int], width: int) -> Tensor:
    return gradient.new_empty(gradient.shape[0], width)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, ctx.packing, ctx.outputs, _ = inputs
    ctx.width = rows.shape[1]
    ctx.save_for_backward(*weights)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    weights = ctx.saved_tensors
    of_x = packed_linear_backward(gradient, weights, ctx.packing, ctx.outputs, ctx.width)
    return of_x, [None] * len(weights), None, None, None


packed_linear.register_gradient(_backward, _save)
