"""Cross-entropy of supervised positions, chunk by chunk, with its gradient formed in the forward pass.

The logits of a chunk, the largest tensors of a step by far, are gone before the next chunk's are made.

Shapes: S supervised positions, E width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

CHUNK_BYTES = 1 << 25
"""How large the fp32 logits of a chunk may be; two tensors of that size live at once."""

Logits = Callable[[torch.Tensor], torch.Tensor]
"""fp32 logits [S, V] of hidden states [S, E]."""


def token_loss(
    logits: Logits,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: torch.nn.Module,
    *,
    whole: bool = False,
) -> torch.Tensor:
    """The summed cross-entropy (fp32 scalar) of hidden states [S, E] against targets int64[S]; S may be 0.

    `head` is the module that `logits` calls, whose trained parameters get their gradient too. With `whole` it is called
    once, and the backward pass is autograd's.
    """
    if whole:
        return cross_entropy(logits(hidden), targets, reduction="sum")
    rows = next((len(parameter) for parameter in head.parameters() if parameter.dim() > 1), 1)
    chunk = max(CHUNK_BYTES // (4 * rows), 1)
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    if not torch.is_grad_enabled() or not (hidden.requires_grad or trained):
        losses = [
            cross_entropy(logits(part), said, reduction="sum")
            for part, said in _parts(hidden, targets, chunk)
        ]
        return torch.stack(losses).sum()
    return _TokenLoss.apply(logits, hidden, targets, chunk, *trained)


def _parts(hidden: torch.Tensor, targets: torch.Tensor, chunk: int) -> Any:
    # At least one, though empty: every rank must run the head, or the others would wait for it.
    return zip(hidden.split(chunk), targets.split(chunk), strict=True)


class _TokenLoss(torch.autograd.Function):
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
        for part, said in _parts(hidden.detach(), targets, chunk):
            with torch.enable_grad():
                part.requires_grad_()
                scores = logits(part)
            # The gradient, softmax less one at the target, is written over the logarithms that give the loss.
            logs = scores.detach().log_softmax(-1)
            total -= logs.gather(1, said[:, None]).sum()
            gradient = logs.exp_().scatter_add_(
                1, said[:, None], logs.new_full((len(said), 1), -1.0)
            )
            found, *rest = torch.autograd.grad(
                scores, [part, *trained], gradient, materialize_grads=True
            )
            del scores, logs, gradient
            of_hidden.append(found)
            for kept, added in zip(of_trained, rest, strict=True):
                kept += added
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
