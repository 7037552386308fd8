"""Gated MLPs with LoRA by torch's matrix products, in chunks of rows.

They compute y = (f(x Wg^T) * x Wu^T) Wd^T.

Activations between the layers exist for one chunk of rows at a time. The backward pass recomputes
f(x Wg^T) and the product from the outputs of gate and up, the only saved tensors of that size.

Shapes: T tokens, E width, F inner width, R the ranks of gate and up together, R' the
rank of down.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    silu,
    functools.partial(gelu, approximate="tanh"),
)
"""Activations by the kernels' numbers."""

DERIVATIVES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    torch.ops.aten.silu_backward,
    functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
)
"""The gradient of each activation's input, from the gradient of its output and the input."""

ROWS = 1024
"""Rows of a chunk: with fewer, oneDNN repacks the weights too often; more do not fit the caches."""


def _parts(count: int) -> list[slice]:
    return [slice(start, min(start + ROWS, count)) for start in range(0, count, ROWS)]


class _Adapter:
    """One layer's A and scaled B in the type of the rows; `rank` is 0 for a layer without LoRA."""

    def __init__(self, down: Tensor, up: Tensor, scale: float, dtype: torch.dtype) -> None:
        self.rank = len(down)
        self.scale = scale
        self.down = down.to(dtype)
        self.up = (up * scale).to(dtype)

    def add(self, out: Tensor, x: Tensor, low: Tensor | None) -> Tensor:
        """Adds x A^T (s B)^T [n, O] to `out`, and writes x A^T [n, r] to `low` if it is passed."""
        if not self.rank:
            return out
        x_down = x @ self.down.t()
        if low is not None:
            low.copy_(x_down)
        return out.addmm_(x_down, self.up.t())

    def flow(
        self,
        flow: Tensor,
        x: Tensor,
        low: Tensor,
        of_x: Tensor | None,
        of_down: Tensor,
        of_up: Tensor,
    ) -> None:
        """Adds to the gradients of x [n, I], A [r, I] and B [O, r].

        `flow` is the gradient of the outputs [n, O].
        """
        if not self.rank:
            return
        back = flow @ self.up
        of_down += back.t() @ x
        of_up += (flow.t() @ low) * self.scale
        if of_x is not None:
            of_x.addmm_(back, self.down)


def _halves(saved: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The outputs of gate and of up [T, F] in the tensor that saves them, [T or more, 2F]."""
    first, second = saved.view(2, len(saved), -1)
    return first[:rows], second[:rows]


def gated_rows(
    rows: Tensor,
    weights: Sequence[Tensor],
    activation: int,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    saved: Sequence[Tensor] | None,
) -> Tensor:
    """The outputs [T, E] of rows [T, E].

    Three tensors of `saved` are written for the backward pass: the outputs of gate and up
    [T or more, 2F], and x A^T of gate and up [T, R] and of down [T, R'].
    """
    gate, up, down = (_Adapter(*each, rows.dtype) for each in zip(downs, ups, scales, strict=True))
    out = rows.new_empty(rows.shape)
    for part in _parts(len(rows)):
        x = rows[part]
        between = (None, None)
        lows = (None, None, None)
        if saved is not None:
            between = tuple(half[part] for half in _halves(saved[0], len(rows)))
            lows = *saved[1][part].split([gate.rank, up.rank], 1), saved[2][part]
        opened = gate.add(torch.mm(x, weights[0].t(), out=between[0]), x, lows[0])
        passed = up.add(torch.mm(x, weights[1].t(), out=between[1]), x, lows[1])
        product = ACTIVATIONS[activation](opened).mul_(passed)
        down.add(torch.mm(product, weights[2].t(), out=out[part]), product, lows[2])
    return out


def gated_rows_backward(
    gradient: Tensor,
    rows: Tensor,
    saved: Sequence[Tensor],
    weights: Sequence[Tensor],
    activation: int,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    gradients: Sequence[Tensor],
) -> None:
    """Writes `gradients`: of x [T, E], of all A concatenated and of all B concatenated.

    The gradient of x has no rows if it is not needed.
    """
    gate, up, down = (_Adapter(*each, rows.dtype) for each in zip(downs, ups, scales, strict=True))
    of_downs, of_ups = (
        [
            part.view_as(each)
            for part, each in zip(
                flat.zero_().split([each.numel() for each in layers]), layers, strict=True
            )
        ]
        for flat, layers in ((gradients[1], downs), (gradients[2], ups))
    )
    halves = _halves(saved[0], len(rows))
    for part in _parts(len(rows)):
        x = rows[part]
        flow = gradient[part]
        opened, passed = (half[part] for half in halves)
        low_gate, low_up = saved[1][part].split([gate.rank, up.rank], 1)
        active = ACTIVATIONS[activation](opened)
        of_product = flow @ weights[2]
        down.flow(flow, active * passed, saved[2][part], of_product, of_downs[2], of_ups[2])
        of_passed = active.mul_(of_product)
        of_opened = DERIVATIVES[activation](of_product.mul_(passed), opened)
        of_x = None
        if len(gradients[0]):
            of_x = torch.mm(of_opened, weights[0], out=gradients[0][part]).addmm_(
                of_passed, weights[1]
            )
        gate.flow(of_opened, x, low_gate, of_x, of_downs[0], of_ups[0])
        up.flow(of_passed, x, low_up, of_x, of_downs[1], of_ups[1])
