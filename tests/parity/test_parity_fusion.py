"""Fusions and gated cross-attention against their formulas, written out in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm

from tests.helpers.tiny_models import largest
from vlm_tune.config.connectors import FusionConnector
from vlm_tune.model.connectors.cross_attention import GatedBlock, Seen
from vlm_tune.model.connectors.instruction import Text
from vlm_tune.model.connectors.registry import build_connector

WIDTH = 8


def stir(module: nn.Module) -> Any:
    """The module in eval mode with every parameter random."""
    generator = torch.Generator().manual_seed(11)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return module.eval()


def attention(
    layer: Any, queries: torch.Tensor, context: torch.Tensor, seen: list[int]
) -> torch.Tensor:
    """One row: queries [Q, D] to the tokens of a context [K, C] that are seen, head by head."""
    context = context[seen]
    query, key, value = (
        queries @ layer.query.weight.T,
        context @ layer.key.weight.T,
        context @ layer.value.weight.T,
    )
    size = query.shape[1] // layer.heads
    heads = []
    for first in range(0, query.shape[1], size):
        part = slice(first, first + size)
        weights = (query[:, part] @ key[:, part].T / size**0.5).softmax(-1)
        heads.append(weights @ value[:, part])
    return torch.cat(heads, 1) @ layer.out.weight.T


def normed(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, norm.eps)


@torch.no_grad()
def expected_fusion(fusion: Any, how: str, v: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """One row: image tokens v [N', E] and normalised words [T, E]."""
    t = words.mean(0)
    both = torch.stack([torch.cat([token, t]) for token in v])
    if how == "concat":
        return v + fusion.mix(both)
    if how == "attention":
        return v + attention(
            fusion.attention, normed(fusion.norm, v), words, list(range(len(words)))
        )
    if how == "gate":
        share = 1 / (1 + torch.exp(-fusion.gate(both)))
        return share * v + (1 - share) * fusion.text(t)
    if how == "product":
        return v + fusion.out(fusion.image(v) * fusion.text(t))
    left, right = (
        fusion.image.weight.view(-1, fusion.factors, WIDTH),
        fusion.text.weight.view(-1, fusion.factors, WIDTH),
    )
    left_bias, right_bias = (
        fusion.image.bias.view(-1, fusion.factors),
        fusion.text.bias.view(-1, fusion.factors),
    )
    forms = torch.stack(
        [
            ((left @ token + left_bias) * (right @ t + right_bias)).sum(1) for token in v
        ]  # sum over factors of (u.v + a)(w.t + b)
    )
    rooted = forms.sign() * (forms.abs() + 1e-6).sqrt() - forms.sign() * 1e-3
    return v + fusion.out(rooted / rooted.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("how", ["concat", "attention", "gate", "product", "bilinear"])
@pytest.mark.parametrize("rank", [None, 6])
@torch.no_grad()
def test_fusion_equals_its_formula(how: Any, rank: int | None) -> None:
    connector = stir(
        build_connector(
            FusionConnector(kind="fusion", how=how, heads=2, rank=rank, factors=3), 5, WIDTH
        )
    )
    features, words = torch.randn(2, 4, 5), torch.randn(2, 6, WIDTH)
    lengths, ids = [6, 2], torch.zeros(2, 6, dtype=torch.int64)
    fused = connector(features, Text(words, torch.arange(6) < torch.tensor(lengths)[:, None], ids))
    image = connector.base(features)
    for row, length in enumerate(lengths):
        expected = expected_fusion(
            connector.fusion, how, image[row], normed(connector.norm, words[row, :length])
        )
        assert largest(fused[row], expected) <= 1e-5
    other = connector(features, Text(words.flip(0), torch.ones(2, 6, dtype=torch.bool), ids))
    assert largest(fused, other) > 1e-2


@torch.no_grad()
def test_gated_block_equals_its_formula() -> None:
    block = stir(GatedBlock(WIDTH, heads=2, head_width=3))
    states, media = torch.randn(2, 3, WIDTH), torch.randn(2, 4, WIDTH)
    mask = torch.tensor(
        [[[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]], [[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]]],
        dtype=torch.bool,
    )
    output = block(states, Seen(media, mask))
    for row in range(2):
        for token in range(3):
            x, seen = states[row, token : token + 1], mask[row, token].nonzero().flatten().tolist()
            if seen:
                x = x + torch.tanh(block.attention_gate) * attention(
                    block.attention, normed(block.norm, x), media[row], seen
                )
            hidden = gelu(normed(block.feed_norm, x) @ block.feed[0].weight.T)
            x = x + torch.tanh(block.feed_gate) * (hidden @ block.feed[2].weight.T)
            assert largest(output[row, token], x[0]) <= 1e-5
    blind = block(states, None)
    assert largest(output[0, 1], blind[0, 1]) <= 1e-6
    assert largest(output[0, 0], blind[0, 0]) > 1e-2


@torch.no_grad()
def test_a_block_with_closed_gates_changes_nothing() -> None:
    states, media = torch.randn(2, 3, WIDTH), torch.randn(2, 4, WIDTH)
    seen = Seen(media, torch.ones(2, 3, 4, dtype=torch.bool))
    assert torch.equal(GatedBlock(WIDTH, heads=2, head_width=None)(states, seen), states)
