"""Cross-entropy of supervised positions, in chunks; the forward pass also computes the gradient.

The logits of a chunk, the largest tensors of a step by far, are freed before those of the next
chunk are computed.

Shapes: S supervised positions, E width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy

CHUNK_BYTES = 1 << 25
"""The most bytes of a chunk's fp32 logits; two tensors of that size are alive at once."""

Logits = Callable[[torch.Tensor], torch.Tensor]
"""A function from hidden states [S, E] to fp32 logits [S, V]."""

Reduction = Literal["sum", "none"]
"""What is made of the losses of positions: their sum, or nothing."""


def token_loss(
    logits: Logits,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: torch.nn.Module,
    *,
    whole: bool = False,
    reduction: Reduction = "sum",
) -> torch.Tensor:
    """Cross-entropy: its sum, an fp32 scalar, or that of each position, fp32[S].

    Args:
        logits: Computes logits [S, V] from hidden states.
        hidden: Hidden states [S, E]; S may be 0.
        targets: Token ids int64[S].
        head: The modules that `logits` calls; their trained parameters get gradients too.
        whole: Whether to call `logits` once for all positions, with autograd's backward pass.
        reduction: "sum", or "none" for the loss of each position.
    """
    if whole:
        return cross_entropy(logits(hidden), targets, reduction=reduction)
    rows = next((len(parameter) for parameter in head.parameters() if parameter.dim() > 1), 1)
    chunk = max(CHUNK_BYTES // (4 * rows), 1)
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    if not torch.is_grad_enabled() or not (hidden.requires_grad or trained):
        losses = [
            cross_entropy(logits(part), labels, reduction=reduction)
            for part, labels in _parts(hidden, targets, chunk)
        ]
        return torch.cat(losses) if reduction == "none" else torch.stack(losses).sum()
    if reduction == "none":
        return _TokenLosses.apply(logits, hidden, targets, chunk, *trained)
    return _TokenLoss.apply(logits, hidden, targets, chunk, *trained)


def _parts(hidden: torch.Tensor, targets: torch.Tensor, chunk: int) -> Any:
    # There is always one chunk, though it may be empty: every rank must run the head, or the others
    # would wait for it.
    return zip(hidden.split(chunk), targets.split(chunk), strict=True)


class _TokenLoss(torch.autograd.Function):
    """The chunked loss; its backward pass scales the gradients that the forward pass computed."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Logits,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        chunk: int,
        *trained: torch.Tensor,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        of_hidden: list[torch.Tensor] = []
        of_trained: Sequence[torch.Tensor] = [torch.zeros_like(parameter) for parameter in trained]
        for part, labels in _parts(hidden.detach(), targets, chunk):
            with torch.enable_grad():
                part.requires_grad_()
                scores = logits(part)
            # The gradient, softmax minus one at the target, overwrites the log-probabilities that
            # the loss is read from.
            logs = scores.detach().log_softmax(-1)
            total -= logs.gather(1, labels[:, None]).sum()
            gradient = logs.exp_().scatter_add_(
                1, labels[:, None], logs.new_full((len(labels), 1), -1.0)
            )
            part_gradient, *rest = torch.autograd.grad(
                scores, [part, *trained], gradient, materialize_grads=True
            )
            del scores, logs, gradient
            of_hidden.append(part_gradient)
            for total_gradient, added in zip(of_trained, rest, strict=True):
                total_gradient += added
        ctx.save_for_backward(torch.cat(of_hidden), *of_trained)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        scale = gradients[0]
        hidden, *trained = ctx.saved_tensors
        return (
            None,
            hidden * scale.to(hidden.dtype),
            None,
            None,
            *(each * scale.to(each.dtype) for each in trained),
        )


class _TokenLosses(torch.autograd.Function):
    """The chunked losses of positions.

    Where the head trains, its gradient depends on the weight that each loss gets in the backward
    pass, which therefore computes the logits again. Else the forward pass computes the gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Logits,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        chunk: int,
        *trained: torch.Tensor,
    ) -> torch.Tensor:
        ctx.logits = logits
        ctx.chunk = chunk
        ctx.dtypes = _autocast_state(hidden.device.type)
        losses: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        for part, labels in _parts(hidden.detach(), targets, chunk):
            with torch.set_grad_enabled(not trained):
                part.requires_grad_(not trained)
                scores = logits(part)
            logs = scores.detach().log_softmax(-1)
            losses.append(-logs.gather(1, labels[:, None])[:, 0])
            if not trained:
                gradient = logs.exp_().scatter_add_(
                    1, labels[:, None], logs.new_full((len(labels), 1), -1.0)
                )
                gradients += torch.autograd.grad(scores, [part], gradient)
        if trained:
            ctx.save_for_backward(hidden, targets, *trained)
        else:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *flows: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        flow = flows[0]
        saved = ctx.saved_tensors
        if len(saved) == 1:
            return None, saved[0] * flow[:, None].to(saved[0].dtype), None, None
        hidden, targets, *trained = saved
        of_hidden: list[torch.Tensor] = []
        of_trained = [torch.zeros_like(parameter) for parameter in trained]
        kind, dtype, enabled = ctx.dtypes
        for (part, labels), weights in zip(
            _parts(hidden.detach(), targets, ctx.chunk), flow.split(ctx.chunk), strict=True
        ):
            with torch.enable_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled):
                part.requires_grad_()
                loss = cross_entropy(ctx.logits(part), labels, reduction="none") @ weights
            part_gradient, *rest = torch.autograd.grad(
                loss, [part, *trained], materialize_grads=True
            )
            of_hidden.append(part_gradient)
            for total, added in zip(of_trained, rest, strict=True):
                total += added
        return None, torch.cat(of_hidden), None, None, *of_trained


def _autocast_state(kind: str) -> tuple[str, torch.dtype, bool]:
    """A kind of device, and the dtype of its autocast and whether it is on."""
    return kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
