"""Decoder layers by torch's operators: what `decoder_layer` computes, in any type.

Shapes: B rows, L tokens, E width, H heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from vlm_tune.kernels.attention import interval_attention
from vlm_tune.kernels.decoder import INNER, Operands
from vlm_tune.kernels.reference_mlp import ACTIVATIONS


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotary tables [B, L, D] to queries or keys [B, H, L, D]."""
    one, other = heads.chunk(2, -1)
    return heads * cos[:, None] + torch.cat([-other, one], -1) * sin[:, None]


def reference(x: Tensor, cos: Tensor, sin: Tensor, visible_until: Tensor, of: Operands) -> Tensor:
    """The output [B, L, E] of `decoder_layer` by torch's operators, in x's type."""
    merged, out, gate, up, down = of.matrices(x)
    width = x.shape[-1]

    def layer(states: Tensor, weight: Tensor, place: int) -> Tensor:
        low = states @ of.downs[place].to(x.dtype).t()
        return linear(states, weight) + low @ (of.ups[place] * of.scales[place]).to(x.dtype).t()

    normed = rms_norm(x, (width,), of.norms[0], of.epsilons[0])
    sizes = [len(each) for each in of.ups[INNER]]
    parts = merged[:, :width].split(sizes)
    biases = [0] * 3 if of.bias is None else of.bias.split(sizes)
    query, key, value = (
        (layer(normed, weight, place) + bias).unflatten(-1, (-1, of.head_width)).transpose(1, 2)
        for place, (weight, bias) in enumerate(zip(parts, biases, strict=True))
    )
    query = rotated(query, cos, sin)
    key = rotated(key, cos, sin)
    attended = interval_attention(query, key, value, visible_until, of.scale)[0].flatten(2)
    outer = layer(attended, out, 3)
    x = x + (outer if of.bias_out is None else outer + of.bias_out)
    normed = rms_norm(x, (width,), of.norms[1], of.epsilons[1])
    opened = ACTIVATIONS[of.activation](layer(normed, gate, 4))
    return x + layer(opened * layer(normed, up, 5), down, 6)
