"""The Perceiver resampler: a fixed number of learned latents attend to the tower's features."""

from __future__ import annotations

import torch
from torch import nn

from vlm_tune.config.connectors import ResamplerConnector
from vlm_tune.model.connectors.layers import Attention, feed_forward
from vlm_tune.model.connectors.projectors import Connector, entry


class ResamplerLayer(nn.Module):
    """Latents attend to the features and themselves, then go through a feed-forward layer."""

    def __init__(self, width: int, heads: int, head_width: int | None) -> None:
        super().__init__()
        self.context_norm = nn.LayerNorm(width)
        self.latents_norm = nn.LayerNorm(width)
        self.attention = Attention(width, width, heads, head_width=head_width)
        self.feed_norm = nn.LayerNorm(width)
        # ReLU and no biases, as in IDEFICS, so that its weights fit.
        self.feed = feed_forward(width, activation=nn.ReLU, bias=False)

    def forward(self, latents: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """New latents [M, latents, D], given features [M, N, D]."""
        normed = self.latents_norm(latents)
        latents = latents + self.attention(
            normed, torch.cat([self.context_norm(features), normed], dim=1)
        )
        return latents + self.feed(self.feed_norm(latents))


class Resampler(Connector):
    """A Perceiver resampler of the tower's width, with a projection to the LLM's width.

    Source: Flamingo, arXiv:2204.14198.
    """

    def __init__(self, config: ResamplerConnector, width: int, llm_width: int) -> None:
        super().__init__()
        self.entry = entry(config, width)
        self.latents = nn.Parameter(torch.randn(config.latents, width))
        self.layers = nn.ModuleList(
            ResamplerLayer(width, config.heads, config.head_width) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, llm_width)

    def tokens(self, tower_tokens: int) -> int:
        """The number of latents."""
        return len(self.latents)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[M, N, D] to [M, latents, E]."""
        features = self.entry(features)
        latents = self.latents.to(features.dtype).expand(len(features), -1, -1)
        for layer in self.layers:
            latents = layer(latents, features)
        return self.project(self.norm(latents))
