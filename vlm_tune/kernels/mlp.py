"""The operator of gated MLPs: y = (f(x Wg^T) * x Wu^T) Wd^T, each layer with LoRA or without.

In bf16 on a CPU each pass is one kernel call (`gated.cpp`). Elsewhere it goes through torch's
matrix products, some rows at a time (`reference_mlp`): of the intermediate tensors only the outputs
of gate and up are saved.

Shapes: T tokens, E width, F intermediate width, R the ranks of gate and up together,
R' the rank of down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlm_tune.kernels.cpu import native
from vlm_tune.kernels.devices import check_devices
from vlm_tune.kernels.lora import NO_NORM, Adapters, by_layer, rows_of, sizes, unpacked
from vlm_tune.kernels.operator import operator
from vlm_tune.kernels.reference_mlp import gated_rows, gated_rows_backward

LARGE = 6144
"""E + 2F above which too few rows fit a core's cache beside the weights streamed through it."""

FEW = 32
"""Rows per thread below which the kernel's blocks are not full."""


def _operands_reason(
    dtype: torch.dtype, device: torch.device, width: int, inner: int
) -> str | None:
    """The reason why the kernel is not for such MLPs, whether it is there or not."""
    if device.type != "cpu":
        return f"the MLP kernel is for CPUs, not {device.type}"
    if dtype != torch.bfloat16:
        return f"the MLP kernel computes in bf16, not {dtype}"
    if inner % 32 or width % 32:
        return f"the widths {width} and {inner} are no multiples of 32"
    if width + 2 * inner > LARGE:
        return f"the widths {width} and {inner} are too large for a core's cache"
    return None


def unsupported_reason(
    dtype: torch.dtype, device: torch.device, width: int, inner: int
) -> str | None:
    """The reason why the kernel does not compute MLPs of widths E and F; None if it does.

    Args:
        dtype: The type to compute in.
        device: The weights' device.
        width: E.
        inner: F.
    """
    return _operands_reason(dtype, device, width, inner) or native.unavailable_reason()


def by_kernel(dtype: torch.dtype, device: torch.device, width: int, inner: int) -> bool:
    """Whether the kernel computes MLPs of these widths E and F in this type."""
    return _operands_reason(dtype, device, width, inner) is None and native.has_kernels()


def gated_weights(
    weights: Sequence[Tensor],
    packing: str,
    ups: Sequence[Tensor],
    downs: Sequence[Tensor],
    like: Tensor,
) -> list[Tensor]:
    """The weights of gate and up [F, E] and down [E, F], unpacked for this pass if in 4 bits."""
    if not packing:
        return list(weights)
    shapes = [(len(up), down.shape[1]) for up, down in zip(ups, downs, strict=True)]
    return [
        unpacked(codes, scales, packing, shape, like.dtype)
        for codes, scales, shape in zip(weights[::2], weights[1::2], shapes, strict=True)
    ]


def _shape(rows: Tensor, weights: Sequence[Tensor], activation: int, *strides: int) -> Any:
    return sizes(
        *rows.shape,
        len(weights[0]),
        activation,
        rows.stride(0),
        *(weight.stride(0) for weight in weights),
        *strides,
    )


@operator("lora_gated_mlp")
def lora_gated_mlp(
    rows: Tensor,
    weights: Sequence[Tensor],
    packing: str,
    activation: int,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A gated MLP's outputs, and with `keep` the tensors that its backward pass needs.

    Args:
        rows: The inputs [T, E].
        weights: Gate and up [F, E] and down [E, F], or with a `packing` the codes and block scales
            of each.
        packing: The kind and block size of 4-bit codes, as in `nf4:64`, or an empty string.
        activation: The index in `ACTIVATIONS`.
        downs: LoRA A of each layer, of rank 0 where it has none.
        ups: LoRA B of each layer.
        scales: What each B is scaled by.
        keep: Whether a backward pass follows; without it the saved tensors have no rows.

    Returns:
        The outputs [T, E] and three saved tensors: the outputs of gate and up, in the kernel's
        block layout [32 ceil(T / 32), 2F] or all of gate before all of up; the outputs of A of gate
        and up [T, R]; and those of A of down [T, R'].
    """
    check_devices("lora_gated_mlp", (rows, *weights, *downs, *ups))
    matrices = gated_weights(weights, packing, ups, downs, rows)
    rows = rows_of(rows)
    saved = _saved(rows, downs, ups, keep)
    saved_or_none = saved if keep else (None,) * 3
    few = not keep and len(rows) < FEW * torch.get_num_threads()
    if few or not by_kernel(rows.dtype, rows.device, rows.shape[1], len(ups[0])):
        out = gated_rows(rows, matrices, activation, downs, ups, scales, saved if keep else None)
        return out, *saved
    adapters = Adapters(downs, ups, scales)
    out = rows.new_empty(rows.shape)
    native.kernels().gated(
        _shape(rows, matrices, activation),
        adapters.array,
        *native.pointers(rows, None),
        NO_NORM,
        *native.pointers(None, *matrices, out, *saved_or_none),
    )
    return out, *saved


def _saved(
    rows: Tensor, downs: Sequence[Tensor], ups: Sequence[Tensor], keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for the backward pass of `lora_gated_mlp`, without rows unless `keep`."""
    count = rows.shape[0] if keep else 0
    # Only the kernel, which computes in bf16, writes blocks of 32 rows.
    blocks = (count + 31) // 32 * 32 if rows.dtype == torch.bfloat16 else count
    return (
        rows.new_empty(blocks, 2 * ups[0].shape[0]),
        rows.new_empty(count, downs[0].shape[0] + downs[1].shape[0]),
        rows.new_empty(count, downs[2].shape[0]),
    )


@lora_gated_mlp.register_fake
def _(
    rows: Tensor,
    weights: Any,
    packing: str,
    activation: int,
    downs: Any,
    ups: Any,
    scales: Any,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_devices("lora_gated_mlp", (rows, *weights, *downs, *ups))
    return rows.new_empty(rows.shape), *_saved(rows, downs, ups, keep)


@operator("lora_gated_mlp_backward")
def lora_gated_mlp_backward(
    gradient: Tensor,
    rows: Tensor,
    saved: Sequence[Tensor],
    weights: Sequence[Tensor],
    packing: str,
    activation: int,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a gated MLP, given that of its outputs, `gradient` [T, E].

    `saved` are the three tensors that `lora_gated_mlp` saved; the other operands are its own.

    Returns:
        The gradient of x [T, E], or [0, E] if not needed; and in fp32 those of all A and of all B,
        flattened one after another.
    """
    matrices = gated_weights(weights, packing, ups, downs, rows)
    rows = rows_of(rows)
    gradient = rows_of(gradient)
    gradients = _gradients(gradient, downs, ups, needs_x)
    # The saved tensors have the layout of whichever computed the forward pass.
    if not by_kernel(rows.dtype, rows.device, rows.shape[1], len(ups[0])):
        gated_rows_backward(
            gradient, rows, saved, matrices, activation, downs, ups, scales, gradients
        )
        return gradients
    adapters = Adapters(downs, ups, scales)
    native.kernels().gated_backward(
        _shape(rows, matrices, activation, gradient.stride(0)),
        adapters.array,
        *native.pointers(
            gradient,
            rows,
            None,
            None,
            *matrices,
            *saved,
            gradients[0] if needs_x else None,
            *gradients[1:],
        ),
    )
    return gradients


def _gradients(
    gradient: Tensor, downs: Sequence[Tensor], ups: Sequence[Tensor], needs_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return (
        gradient.new_empty(gradient.shape[0] if needs_x else 0, gradient.shape[1]),
        gradient.new_empty(sum(down.numel() for down in downs), dtype=wide),
        gradient.new_empty(sum(up.numel() for up in ups), dtype=wide),
    )


@lora_gated_mlp_backward.register_fake
def _(
    gradient: Tensor,
    rows: Tensor,
    saved: Any,
    weights: Any,
    packing: str,
    activation: int,
    downs: Any,
    ups: Any,
    scales: Any,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(gradient, downs, ups, needs_x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, weights, ctx.packing, ctx.activation, downs, ups, ctx.scales, _ = inputs
    ctx.count = len(weights)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for the saved outputs would be as large as they are
    ctx.save_for_backward(rows, *output[1:], *weights, *downs, *ups)


def _backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Any, ...]:
    rows, *rest = ctx.saved_tensors
    saved = rest[:3]
    weights = rest[3 : 3 + ctx.count]
    downs = rest[3 + ctx.count : 6 + ctx.count]
    ups = rest[6 + ctx.count :]
    needs_x = ctx.needs_input_grad[0]
    x, *flat_gradients = lora_gated_mlp_backward(
        gradient, rows, saved, weights, ctx.packing, ctx.activation, downs, ups, ctx.scales, needs_x
    )
    of_downs, of_ups = (
        by_layer(flat, layers) for flat, layers in zip(flat_gradients, (downs, ups), strict=True)
    )
    return x if needs_x else None, [None] * ctx.count, None, None, of_downs, of_ups, None, None


lora_gated_mlp.register_gradient(_backward, _save)
