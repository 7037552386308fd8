"""The Q-Former: learned queries attend to the tower's features and, optionally, the instruction.

Shapes: M media places, N tower tokens, D tower width, Q queries, T instruction tokens, W the
Q-Former's width, E LLM width.
"""

from __future__ import annotations

import torch
from torch import nn

from vlm_tune.config.connectors import QFormerConnector
from vlm_tune.model.connectors.instruction import Text
from vlm_tune.model.connectors.layers import Attention, feed_forward
from vlm_tune.model.connectors.projectors import Connector, entry

EPSILON = 1e-12
"""Epsilon of its LayerNorms, as in BERT."""


class QFormerLayer(nn.Module):
    """A Q-Former layer.

    It has self-attention over queries and text, in some layers cross-attention of the queries to
    the features, and separate feed-forward layers for queries and text.
    """

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
        """New states [M, Q + T, W], or [M, Q, W] from a layer without a feed-forward for text.

        Args:
            states: [M, Q + T, W], the queries first.
            queries: Q.
            features: the tower's features [M, N, D].
            mask: bool[M, 1, Q + T], true where a token is real; None without text.
        """
        states = self.attention_norm(states + self.attention(states, states, mask))
        query_states = states[:, :queries]
        text_states = states[:, queries:]
        if self.cross is not None and self.cross_norm is not None:
            query_states = self.cross_norm(query_states + self.cross(query_states, features))
        query_states = self.feed_norm(query_states + self.feed(query_states))
        if self.text_feed is None or self.text_norm is None:
            return query_states
        return torch.cat(
            [query_states, self.text_norm(text_states + self.text_feed(text_states))], dim=1
        )


class QFormer(Connector):
    """BLIP-2's Q-Former (arXiv:2301.12597); with `text`, InstructBLIP's (arXiv:2305.06500).

    InstructBLIP's attends to the instruction too. Its tokens are the LLM's input embeddings with a
    learned projection: this needs no second tokenizer, and words that are not in the training data
    still have a meaning. With a `tokenizer` of its own, as in InstructBLIP, the Q-Former also has
    its own embeddings.
    """

    def __init__(self, config: QFormerConnector, width: int, llm_width: int) -> None:
        super().__init__()
        self.needs_text = config.text
        inner = config.width
        self.entry = entry(config, width)
        self.queries = nn.Parameter(0.02 * torch.randn(config.queries, inner))
        self.norm = nn.LayerNorm(inner, eps=EPSILON)
        words = (
            nn.Embedding(config.vocab_size, inner)
            if config.vocab_size
            else nn.Linear(llm_width, inner)
        )
        self.words = words if config.text else None
        self.positions = nn.Embedding(config.max_text, inner) if config.text else None
        # The text's states are unused after the last layer: it has no feed-forward for them.
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
        """The number of queries."""
        return len(self.queries)

    def forward(self, features: torch.Tensor, text: Text | None = None) -> torch.Tensor:
        """[M, N, D] to [M, Q, E]."""
        features = self.entry(features)
        count = len(self.queries)
        states = self.queries.to(features.dtype).expand(len(features), -1, -1)
        mask = None
        if text is not None and self.words is not None and self.positions is not None:
            words, text_mask = self._words(text.last(self.positions.num_embeddings))
            text_states = words + self.positions.weight[: text_mask.shape[1]]
            states = torch.cat([states, text_states.to(states.dtype)], dim=1)
            mask = torch.cat([text_mask.new_ones(len(features), count), text_mask], dim=1)[:, None]
        states = self.norm(states)
        for layer in self.layers:
            states = layer(states, count, features, mask)
        return self.project(states[:, :count])

    def _words(self, text: Text) -> tuple[torch.Tensor, torch.Tensor]:
        """The instruction's word embeddings [M, T, W] and their mask bool[M, T]."""
        if not isinstance(self.words, nn.Embedding):
            return self.words(text.embeds), text.mask  # type: ignore[misc]
        # A memory plan has no tokenizer: it assumes as many tokens as the LLM's.
        ids, mask = (
            self.reader(text)
            if self.reader
            else (
                torch.zeros_like(text.mask, dtype=torch.int64),
                text.mask,
            )
        )
        return self.words(ids), mask
