"""The operator behind the loss of supervised positions under a frozen output head: cross-entropy, its gradient formed with it.

The kernel (`head.cpp`) is for a CPU with AMX, in bf16. It writes no logits to memory: what is kept is the gradient.

Shapes: S supervised positions, E width, V vocabulary.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm_tune.kernels.cpu import native
from vlm_tune.kernels.lora_linear import rows_of, sizes
from vlm_tune.model.acceleration.lora_layers import compute_dtype

# A compiler's cache knows an operator by its name alone, so what it does is part of that.
SOURCE = hashlib.sha256(Path(__file__).read_bytes() + native.code(native.KERNELS)).hexdigest()[:8]

LARGE = 2048
"""E above which too few positions fit a core's cache beside the weights that pass."""


def by_kernel(hidden: Tensor, head: nn.Module) -> bool:
    """Whether the loss of hidden states [S, E] under a head is the kernel's: a frozen bf16 weight and nothing else."""
    if (
        hidden.device.type != "cpu"
        or compute_dtype(hidden) != torch.bfloat16
        or type(head) is not nn.Linear
    ):
        return False
    weight = head.weight
    return (
        head.bias is None
        and weight.dtype == torch.bfloat16
        and not weight.requires_grad
        and weight.device == hidden.device
        and weight.stride(1) == 1
        and not hasattr(
            weight, "ds_id"
        )  # ZeRO-3 gathers a sharded weight only for the module that owns it
        and not (head._forward_hooks or head._forward_pre_hooks)
        and weight.shape[1] % 32 == 0
        and weight.shape[1] <= LARGE
        and native.has_kernels()
    )


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The summed cross-entropy (fp32 scalar) of hidden states [S, E] under a bf16 weight [V, E] against targets int64[S]; S may be 0."""
    return losses(
        hidden.to(torch.bfloat16), weight, targets, torch.is_grad_enabled() and hidden.requires_grad
    )[0].sum()


def _room(rows: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    return (
        rows.new_empty(len(rows), dtype=torch.float32),
        rows.new_empty(len(rows) if keep else 0, rows.shape[1], dtype=torch.float32),
    )


@torch.library.custom_op(f"vlm_tune::head_losses_{SOURCE}", mutates_args=())
def losses(rows: Tensor, weight: Tensor, targets: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """fp32 cross-entropy [S] of bf16 hidden states [S, E], and with `keep` its fp32 gradients [S, E].

    Raises IndexError for a target that the vocabulary does not have.
    """
    rows = rows_of(rows)
    targets = targets.contiguous()
    found, gradient = _room(rows, keep)
    if len(rows):
        low, high = (int(each) for each in targets.aminmax())
        if low < 0 or high >= len(weight):
            raise IndexError(
                f"targets from {low} to {high} are not all of a vocabulary of {len(weight)}"
            )
        shape = sizes(*rows.shape, len(weight), rows.stride(0), weight.stride(0))
        native.kernels().head(
            shape, *native.pointers(rows, weight, targets, found, gradient if keep else None)
        )
    return found, gradient


@losses.register_fake
def _(rows: Tensor, weight: Tensor, targets: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    return _room(rows, keep)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, flow: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return (gradient * flow[:, None]).to(torch.bfloat16), None, None, None


losses.register_autograd(_backward, setup_context=_save)
