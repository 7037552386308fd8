"""The Q-Former: learned queries read the tower's features, and the instruction where it is text-conditioned.

Shapes: M media places, N tower tokens, D tower width, Q queries, T instruction tokens, W the Q-Former's width.
"""

from __future__ import annotations

import torch
from torch import nn

from vlm_tune.config.model import QFormerConnector
from vlm_tune.model.connectors.instruction import Text
from vlm_tune.model.connectors.layers import Attention, feed_forward
from vlm_tune.model.connectors.projectors import Connector, entry

EPSILON = 1e-12
"""Of its LayerNorms, as BERT's."""


class QFormerLayer(nn.Module):
    """Self-attention of queries and text, cross-attention of the queries in some layers, a feed-forward layer for each."""

    def __init__(self, width: int, heads: int, *, feature_width: int | None, text: bool) -> None:
        super().__init__()
        self.attention = Attention(width, width, heads, bias=True)
        self.attention_norm = nn.LayerNorm(width, eps=EPSILON)
        self.cross = (
            None if feature_width is None else Attention(width, feature_width, heads, bias=True)
        )
        self.cross_norm = None if feature_width is None else nn.LayerNorm(width, eps=EPSILON)
        self.feed = feed_forward(width)
        self.feed_norm = nn.LayerNorm(width, eps=EPSILON)
        self.text_feed = feed_forward(width) if text else None
        self.text_norm = nn.LayerNorm(width, eps=EPSILON) if text else None

    def forward(
        self, states: torch.Tensor, queries: int, features: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """New states [M, Q + T, W], or [M, Q, W] from a layer without a feed-forward for text; mask bool[M, 1, Q + T]."""
        states = self.attention_norm(states + self.attention(states, states, mask))
        asked = states[:, :queries]
        read = states[:, queries:]
        if self.cross is not None and self.cross_norm is not None:
            asked = self.cross_norm(asked + self.cross(asked, features))
        asked = self.feed_norm(asked + self.feed(asked))
        if self.text_feed is None or self.text_norm is None:
            return asked
        return torch.cat([asked, self.text_norm(read + self.text_feed(read))], dim=1)


class QFormer(Connector):
    """BLIP-2's Q-Former (arXiv:2301.12597); with `text` InstructBLIP's, which reads the instruction too (arXiv:2305.06500).

    The words come as the LLM's own input embeddings, through a learned projection: no second tokenizer, and a word
    that the training data never holds has a meaning all the same. With a `tokenizer` of its own, as InstructBLIP's, they
    are embeddings of its own too.
    """

    def __init__(self, config: QFormerConnector, width: int, llm_width: int) -> None:
        super().__init__()
        self.needs_text = config.text
        inner = config.width
        self.entry = entry(config, width)
        self.queries = nn.Parameter(0.02 * torch.randn(config.queries, inner))
        self.norm = nn.LayerNorm(inner, eps=EPSILON)
        own = (
            nn.Embedding(config.vocab_size, inner)
            if config.vocab_size
            else nn.Linear(llm_width, inner)
        )
        self.words = own if config.text else None
        self.positions = nn.Embedding(config.max_text, inner) if config.text else None
        # Nobody reads the text's states after the last layer: it has no feed-forward for them.
        self.layers = nn.ModuleList(
            QFormerLayer(
                inner,
                config.heads,
                feature_width=None if place % config.every else width,
                text=config.text and place < config.depth - 1,
            )
            for place in range(config.depth)
        )
        self.project = nn.Linear(inner, llm_width)

    def tokens(self, tower_tokens: int) -> int:
        """One a query."""
        return len(self.queries)

    def forward(self, features: torch.Tensor, text: Text | None = None) -> torch.Tensor:
        """[M, N, D] to [M, Q, E]."""
        features = self.entry(features)
        count = len(self.queries)
        states = self.queries.to(features.dtype).expand(len(features), -1, -1)
        mask = None
        if text is not None and self.words is not None and self.positions is not None:
            words, seen = self._words(text.last(self.positions.num_embeddings))
            read = words + self.positions.weight[: seen.shape[1]]
            states = torch.cat([states, read.to(states.dtype)], dim=1)
            mask = torch.cat([seen.new_ones(len(features), count), seen], dim=1)[:, None]
        states = self.norm(states)
        for layer in self.layers:
            states = layer(states, count, features, mask)
        return self.project(states[:, :count])

    def _words(self, text: Text) -> tuple[torch.Tensor, torch.Tensor]:
        """The instruction's word embeddings [M, T, W] and their mask bool[M, T]."""
        if not isinstance(self.words, nn.Embedding):
            return self.words(text.embeds), text.mask  # type: ignore[misc]
        # A plan knows no words: it counts as many as the LLM has.
        ids, mask = self.reader(text) if self.reader else (torch.zeros_like(text.ids), text.mask)
        return self.words(ids), mask
