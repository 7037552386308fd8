"""Fusion of image and text features: each connected image token is combined with the instruction.

Shapes: M media places, N' connected tokens, T instruction tokens, E LLM width. v is an image token,
t the instruction's mean after a LayerNorm.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import normalize

from vlm_tune.config.connectors import FusionConnector
from vlm_tune.model.connectors.instruction import Text
from vlm_tune.model.connectors.layers import Attention
from vlm_tune.model.connectors.projectors import Connector


class Concat(nn.Module):
    """Concatenation: v + W [v; t]."""

    def __init__(self, config: FusionConnector, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * width, width)

    def forward(self, image: torch.Tensor, words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[M, N', E] of image [M, N', E] and words [M, T, E]."""
        return image + self.mix(torch.cat([image, mean(words, mask).expand_as(image)], dim=-1))


class Attend(nn.Module):
    """Attention: v + the attention of v to the instruction's tokens."""

    def __init__(self, config: FusionConnector, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, width, config.heads)

    def forward(self, image: torch.Tensor, words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[M, N', E] of image [M, N', E] and words [M, T, E]."""
        return image + self.attention(self.norm(image), words, mask[:, None])


class Gate(nn.Module):
    """Gated multimodal unit: z * v + (1 - z) * W t, z = sigmoid(G [v; t]) (arXiv:1702.01992)."""

    def __init__(self, config: FusionConnector, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * width, width)
        self.text = nn.Linear(width, width)

    def forward(self, image: torch.Tensor, words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[M, N', E] of image [M, N', E] and words [M, T, E]."""
        instruction = mean(words, mask)
        share = self.gate(torch.cat([image, instruction.expand_as(image)], dim=-1)).sigmoid()
        return share * image + (1 - share) * self.text(instruction)


class Product(nn.Module):
    """Elementwise product in a space of width `rank`: v + W (V v * U t) (arXiv:1610.04325)."""

    def __init__(self, config: FusionConnector, width: int) -> None:
        super().__init__()
        inner = config.rank or width
        self.image = nn.Linear(width, inner)
        self.text = nn.Linear(width, inner)
        self.out = nn.Linear(inner, width)

    def forward(self, image: torch.Tensor, words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[M, N', E] of image [M, N', E] and words [M, T, E]."""
        return image + self.out(self.image(image) * self.text(mean(words, mask)))


class Bilinear(nn.Module):
    """Multi-modal factorised bilinear pooling: v + W f(b) (arXiv:1708.01471).

    b are `rank` bilinear forms of v and t, each of rank `factors`; f is the signed square root,
    normalised to unit length.
    """

    def __init__(self, config: FusionConnector, width: int) -> None:
        super().__init__()
        inner = config.rank or width
        self.factors = config.factors
        self.image, self.text = (
            nn.Linear(width, inner * self.factors),
            nn.Linear(width, inner * self.factors),
        )
        self.out = nn.Linear(inner, width)

    def forward(self, image: torch.Tensor, words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[M, N', E] of image [M, N', E] and words [M, T, E]."""
        forms = (
            (self.image(image) * self.text(mean(words, mask)))
            .unflatten(-1, (-1, self.factors))
            .sum(-1)
            .float()
        )
        # The root's gradient is unbounded at zero: a small offset keeps it finite.
        rooted = normalize(forms.sign() * ((forms.abs() + 1e-6).sqrt() - 1e-3), dim=-1)
        return image + self.out(rooted.to(image.dtype))


def mean(words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean [M, 1, E] of words [M, T, E] where mask bool[M, T] is true."""
    counted = mask[..., None].to(words.dtype)
    return (words * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True)


FUSIONS: dict[str, type[nn.Module]] = {
    "concat": Concat,
    "attention": Attend,
    "gate": Gate,
    "product": Product,
    "bilinear": Bilinear,
}


class Fusion(Connector):
    """A connector whose tokens are combined with the instruction before they enter the LLM."""

    needs_text = True

    def __init__(self, config: FusionConnector, base: Connector, llm_width: int) -> None:
        super().__init__()
        self.base = base
        self.norm = nn.LayerNorm(llm_width)
        self.fusion = FUSIONS[config.how](config, llm_width)

    def tokens(self, tower_tokens: int) -> int:
        """As many as the base connector's."""
        return self.base.tokens(tower_tokens)

    def forward(self, features: torch.Tensor, text: Text) -> torch.Tensor:
        """[M, N, D] to [M, N', E]."""
        return self.fusion(self.base(features), self.norm(text.embeds), text.mask)
