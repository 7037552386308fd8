"""Multi-head attention and feed-forward layers for connectors.

Shapes: B rows, Q queries, K context tokens, D width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from vlm_tune.errors import ModelError


def matched(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """x in the dtype of a module's weights, unless autocast sees to that.

    A model that was just trained has its connector in fp32 beside a tower and an LLM in half
    precision.
    """
    dtype = next(module.parameters()).dtype
    return x if x.dtype == dtype or torch.is_autocast_enabled(x.device.type) else x.to(dtype)


class Attention(nn.Module):
    """Attention of queries [B, Q, D] to a context [B, K, C].

    It has `heads` heads of width `head_width` (by default D / heads). Raises `ModelError` if the
    heads don't divide D.
    """

    def __init__(
        self,
        width: int,
        context_width: int,
        heads: int,
        *,
        head_width: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if head_width is None and width % heads:
            raise ModelError(
                f"model.connector.heads: {heads} attention heads don't divide a width of {width}"
            )
        self.heads = heads
        inner = heads * (head_width or width // heads)
        self.query = nn.Linear(width, inner, bias=bias)
        self.key = nn.Linear(context_width, inner, bias=bias)
        self.value = nn.Linear(context_width, inner, bias=bias)
        self.out = nn.Linear(inner, width, bias=bias)

    def forward(
        self, queries: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The attention's output [B, Q, D].

        `mask` bool[B, Q or 1, K] is true where a query sees the context; the attended values of a
        query that sees none of it are zeros.
        """
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.query(queries), self.key(context), self.value(context))
        )
        if mask is None:
            attended = scaled_dot_product_attention(query, key, value)
        else:
            blind = ~mask.any(-1, keepdim=True)[:, None]  # softmax over nothing is NaN
            attended = scaled_dot_product_attention(
                query, key, value, attn_mask=mask[:, None] | blind
            ).masked_fill(blind, 0.0)
        return self.out(attended.transpose(1, 2).flatten(2))


def feed_forward(
    width: int, *, activation: type[nn.Module] = nn.GELU, bias: bool = True
) -> nn.Sequential:
    """Two linear layers with a hidden width of 4 * `width`."""
    return nn.Sequential(
        nn.Linear(width, 4 * width, bias=bias), activation(), nn.Linear(4 * width, width, bias=bias)
    )
