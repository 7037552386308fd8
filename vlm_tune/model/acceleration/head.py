"""The cross-entropy operator under a frozen output head: the loss and its gradient in one pass.

The kernel (`head.cpp`) is for a CPU with AMX, in bf16. It writes no logits to memory: only the
gradient is saved for the backward pass.

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

# A compiler's cache identifies an operator by its name alone, so the name has a hash of its code.
SOURCE = hashlib.sha256(Path(__file__).read_bytes() + native.code(native.KERNELS)).hexdigest()[:8]

LARGE = 2048
"""E above which too few positions fit a core's cache beside the weights streamed through it."""


def by_kernel(hidden: Tensor, head: nn.Module) -> bool:
    """Whether the kernel computes the loss of hidden states [S, E] under this head.

    The head must be a plain linear layer with a frozen bf16 weight and no bias.
    """
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
        # ZeRO-3 gathers a sharded weight only for the module that owns it.
        and not hasattr(weight, "ds_id")
        and not (head._forward_hooks or head._forward_pre_hooks)
        and weight.shape[1] % 32 == 0
        and weight.shape[1] <= LARGE
        and native.has_kernels()
    )


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy, an fp32 scalar.

    Args:
        hidden: Hidden states [S, E]; S may be 0.
        weight: The head's bf16 weight [V, E].
        targets: Token ids int64[S].
    """
    return losses(
        hidden.to(torch.bfloat16), weight, targets, torch.is_grad_enabled() and hidden.requires_grad
    )[0].sum()


def _room(rows: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Empty fp32 outputs of `losses`: losses [S], and gradients [S, E], [0, E] without `keep`."""
    return (
        rows.new_empty(len(rows), dtype=torch.float32),
        rows.new_empty(len(rows) if keep else 0, rows.shape[1], dtype=torch.float32),
    )


@torch.library.custom_op(f"vlm_tune::head_losses_{SOURCE}", mutates_args=())
def losses(rows: Tensor, weight: Tensor, targets: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """fp32 cross-entropy [S] of bf16 hidden states [S, E], with `keep` its gradients fp32[S, E].

    Raises:
        IndexError: A target is not in the vocabulary.
    """
    rows = rows_of(rows)
    targets = targets.contiguous()
    loss, gradient = _room(rows, keep)
    if len(rows):
        low, high = (int(each) for each in targets.aminmax())
        if low < 0 or high >= len(weight):
            raise IndexError(
                f"targets from {low} to {high} are not all of a vocabulary of {len(weight)}"
            )
        shape = sizes(*rows.shape, len(weight), rows.stride(0), weight.stride(0))
        native.kernels().head(
            shape, *native.pointers(rows, weight, targets, loss, gradient if keep else None)
        )
    return loss, gradient


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
