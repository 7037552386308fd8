"""The operator of cross-entropy under a frozen output head: the loss and its gradient in one pass.

The kernel (`head.cpp`) computes in bf16 on a CPU and writes no logits to memory. Elsewhere the
logits of some positions exist at a time. Only the gradient is saved for the backward pass.

Shapes: S supervised positions, E width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_tune.kernels.cpu import native
from vlm_tune.kernels.devices import check_devices
from vlm_tune.kernels.lora import rows_of, sizes
from vlm_tune.kernels.operator import operator

LARGE = 2048
"""E above which too few positions fit a core's cache beside the weights streamed through it."""


CHUNK = 1024
"""Positions whose logits exist at a time where torch computes them."""


def unsupported_reason(dtype: torch.dtype, weight: Tensor) -> str | None:
    """The reason why the kernel does not compute the loss under a head; None if it does.

    Args:
        dtype: The type to compute in.
        weight: The head's weight [V, E].
    """
    if weight.device.type != "cpu":
        return f"the kernel of the loss is for CPUs, not {weight.device.type}"
    if weight.dtype != torch.bfloat16:
        return f"the head's weight is {weight.dtype}, and the kernel of the loss takes bf16"
    if dtype != torch.bfloat16:
        return f"the kernel of the loss computes in bf16, not {dtype}"
    width = weight.shape[1]
    if width % 32 or width > LARGE:
        return f"the width {width} is no multiple of 32 up to {LARGE}"
    return native.unavailable_reason()


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of logits hidden weight^T under a frozen head, an fp32 scalar.

    Args:
        hidden: Hidden states [S, E]; S may be 0.
        weight: The head's weight [V, E], which gets no gradient.
        targets: Token ids int64[S].

    Raises:
        IndexError: A target is not in the vocabulary.
        ValueError: The tensors are on several devices.
    """
    keep = torch.is_grad_enabled() and hidden.requires_grad
    return losses(hidden.to(weight.dtype), weight, targets, keep)[0].sum()


def _room(rows: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Empty fp32 outputs of `losses`: losses [S], and gradients [S, E], [0, E] without `keep`."""
    return (
        rows.new_empty(len(rows), dtype=torch.float32),
        rows.new_empty(len(rows) if keep else 0, rows.shape[1], dtype=torch.float32),
    )


@operator("linear_cross_entropy")
def losses(rows: Tensor, weight: Tensor, targets: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """fp32 cross-entropy [S] of hidden states [S, E], with `keep` its gradients fp32[S, E].

    Raises:
        IndexError: A target is not in the vocabulary.
        ValueError: The tensors are on several devices.
    """
    if unsupported_reason(rows.dtype, weight) is not None or weight.stride(1) != 1:
        return reference_losses(rows, weight, targets, keep)
    _check(rows, weight, targets)
    loss, gradient = _room(rows, keep)
    if len(rows):
        rows = rows_of(rows)
        targets = targets.contiguous()
        shape = sizes(*rows.shape, len(weight), rows.stride(0), weight.stride(0))
        native.kernels().head(
            shape,
            *native.pointers(rows, weight, targets, loss, gradient if keep else None),
        )
    return loss, gradient


def reference_losses(
    rows: Tensor, weight: Tensor, targets: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """`losses` by torch's operators, `CHUNK` positions at a time."""
    _check(rows, weight, targets)
    loss, gradient = _room(rows, keep)
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        logits = (rows[part] @ weight.t()).float()
        log_probabilities = logits.log_softmax(-1)
        loss[part] = -log_probabilities.gather(1, targets[part, None])[:, 0]
        if keep:
            probabilities = log_probabilities.exp_()
            probabilities.scatter_add_(
                1, targets[part, None], -torch.ones_like(targets[part, None], dtype=torch.float32)
            )
            gradient[part] = probabilities.to(weight.dtype) @ weight
    return loss, gradient


def _check(rows: Tensor, weight: Tensor, targets: Tensor) -> None:
    check_devices("linear_cross_entropy", (rows, weight, targets))
    if targets.dtype != torch.int64:
        raise TypeError(f"targets are int64, got {targets.dtype}")
    if len(targets):
        low, high = (int(each) for each in targets.aminmax())
        if low < 0 or high >= len(weight):
            raise IndexError(
                f"targets from {low} to {high} are not all of a vocabulary of {len(weight)}"
            )


@losses.register_fake
def _(rows: Tensor, weight: Tensor, targets: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    check_devices("linear_cross_entropy", (rows, weight, targets))
    return _room(rows, keep)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, flow: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return (gradient * flow[:, None]).to(ctx.dtype), None, None, None


losses.register_gradient(_backward, _save)
