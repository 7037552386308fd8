"""Gated feed-forward parts by torch's matrix products: y = (f(x Wg^T) * x Wu^T) Wd^T with LoRA, some rows at a time.

What lies between the layers is as large as some rows make it. The backward pass makes f(x Wg^T) and its product again from
the outputs of gate and up, which are all of that size that is kept.

Shapes: T tokens, H inputs and outputs, F numbers between, R the ranks of gate and up together, D that of down.
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
"""By the kernel's number of each."""

DERIVATIVES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    torch.ops.aten.silu_backward,
    functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
)
"""The gradient of what each is given, from that of its output and what it was given."""

ROWS = 1024
"""Rows at a time: fewer have oneDNN pack the weights anew too often, more leave the caches."""


def _parts(count: int) -> list[slice]:
    return [slice(start, min(start + ROWS, count)) for start in range(0, count, ROWS)]


class _Adapter:
    """One layer's A and scaled B in the type of the rows; `rank` 0 where it has none."""

    def __init__(self, down: Tensor, up: Tensor, scale: float, dtype: torch.dtype) -> None:
        self.rank = len(down)
        self.scale = scale
        self.down = down.to(dtype)
        self.up = (up * scale).to(dtype)

    def add(self, out: Tensor, x: Tensor, low: Tensor | None) -> Tensor:
        """Adds x A^T (s B)^T [n, O] to `out`, and writes x A^T to `low` [n, r]."""
        if not self.rank:
            return out
        found = x @ self.down.t()
        if low is not None:
            low.copy_(found)
        return out.addmm_(found, self.up.t())

    def flow(
        self,
        flow: Tensor,
        x: Tensor,
        low: Tensor,
        of_x: Tensor | None,
        of_down: Tensor,
        of_up: Tensor,
    ) -> None:
        """Adds to the gradients of x [n, I], A [r, I] and B [O, r] what flows back from the outputs [n, O]."""
        if not self.rank:
            return
        back = flow @ self.up
        of_down += back.t() @ x
        of_up += (flow.t() @ low) * self.scale
        if of_x is not None:
            of_x.addmm_(back, self.down)


def _halves(kept: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The outputs of gate and of up [T, F] in what is kept of them, [T or more, 2F]."""
    first, second = kept.view(2, len(kept), -1)
    return first[:rows], second[:rows]


def gated_rows(
    rows: Tensor,
    weights: Sequence[Tensor],
    activation: int,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    kept: Sequence[Tensor] | None,
) -> Tensor:
    """The outputs [T, H] of rows [T, H]; what is `kept` of gate and up [T or more, 2F] and of the A, [T, R] and [T, D], is written."""
    gate, up, down = (_Adapter(*each, rows.dtype) for each in zip(downs, ups, scales, strict=True))
    out = rows.new_empty(rows.shape)
    for part in _parts(len(rows)):
        x = rows[part]
        between = (None, None)
        lows = (None, None, None)
        if kept is not None:
            between = tuple(half[part] for half in _halves(kept[0], len(rows)))
            lows = *kept[1][part].split([gate.rank, up.rank], 1), kept[2][part]
        opened = gate.add(torch.mm(x, weights[0].t(), out=between[0]), x, lows[0])
        passed = up.add(torch.mm(x, weights[1].t(), out=between[1]), x, lows[1])
        product = ACTIVATIONS[activation](opened).mul_(passed)
        down.add(torch.mm(product, weights[2].t(), out=out[part]), product, lows[2])
    return out


def gated_rows_backward(
    gradient: Tensor,
    rows: Tensor,
    kept: Sequence[Tensor],
    weights: Sequence[Tensor],
    activation: int,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    found: Sequence[Tensor],
) -> None:
    """Writes the gradients of x [T, H] (of no rows where it is not wanted), and those of every A and every B, one after another."""
    gate, up, down = (_Adapter(*each, rows.dtype) for each in zip(downs, ups, scales, strict=True))
    of_downs, of_ups = (
        [
            part.view_as(each)
            for part, each in zip(
                flat.zero_().split([each.numel() for each in layers]), layers, strict=True
            )
        ]
        for flat, layers in ((found[1], downs), (found[2], ups))
    )
    halves = _halves(kept[0], len(rows))
    for part in _parts(len(rows)):
        x = rows[part]
        flow = gradient[part]
        opened, passed = (half[part] for half in halves)
        low_gate, low_up = kept[1][part].split([gate.rank, up.rank], 1)
        active = ACTIVATIONS[activation](opened)
        of_product = flow @ weights[2]
        down.flow(flow, active * passed, kept[2][part], of_product, of_downs[2], of_ups[2])
        of_passed = active.mul_(of_product)
        of_opened = DERIVATIVES[activation](of_product.mul_(passed), opened)
        of_x = None
        if len(found[0]):
            of_x = torch.mm(of_opened, weights[0], out=found[0][part]).addmm_(of_passed, weights[1])
        gate.flow(of_opened, x, low_gate, of_x, of_downs[0], of_ups[0])
        up.flow(of_passed, x, low_up, of_x, of_downs[1], of_ups[1])
