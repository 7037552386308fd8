"""Connectors: tower features [B, N, D] to [B, N', E] in the LLM's embedding space.

A new kind is a config class in `config.py`, a module here, and a line in CONNECTORS.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlm_tune.config import LinearConnector, MlpConnector


class Connector(nn.Module):
    """Base of the connectors."""

    def tokens(self, tower_tokens: int) -> int:
        """Tokens an image takes in the LLM, given the tower's."""
        return tower_tokens


class Linear(Connector):
    """One linear projection (LLaVA, arXiv:2304.08485)."""

    def __init__(self, config: LinearConnector, width: int, llm_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if config.norm else nn.Identity()
        self.linear = nn.Linear(width, llm_width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, N, D] to [B, N, E]."""
        return self.linear(self.norm(features))


class Mlp(Connector):
    """Linear layers with GELU between them (LLaVA-1.5, arXiv:2310.03744)."""

    def __init__(self, config: MlpConnector, width: int, llm_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if config.norm else nn.Identity()
        layers: list[nn.Module] = [nn.Linear(width, llm_width)]
        for _ in range(config.depth - 1):
            layers += [nn.GELU(), nn.Linear(llm_width, llm_width)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, N, D] to [B, N, E]."""
        return self.layers(self.norm(features))


CONNECTORS: dict[str, type[Connector]] = {"linear": Linear, "mlp": Mlp}


def build_connector(config: LinearConnector | MlpConnector, width: int, llm_width: int) -> Connector:
    """A connector with random weights from the tower's width to the LLM's."""
    kind: Any = CONNECTORS[config.kind]
    return kind(config, width, llm_width)
