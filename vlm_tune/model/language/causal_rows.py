"""Rows of a decoder that join and leave while they are continued.

Every row begins in the first column of the buffers, so that a token's column is its position: a
prefix is copied to a row as it is, and rows of different lengths are no more than a mask.

Shapes: R rows, B rows that join, S of their tokens, C columns, E width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from vlm_tune.compat import cache_name
from vlm_tune.model.language.masks import Blocks, layer_masks
from vlm_tune.model.language.row_buffers import Prefix, RowBuffers, order_after

if TYPE_CHECKING:
    from vlm_tune.model.language.causal import CausalLLM


class CausalRows:
    """Rows of a decoder, see `Rows`."""

    takes_prefixes = True

    def __init__(self, llm: CausalLLM) -> None:
        self.llm = llm
        self.lengths: list[int] = []
        self.buffers = RowBuffers()

    def __len__(self) -> int:
        return len(self.lengths)

    def join(
        self,
        embeds: torch.Tensor,
        lengths: Sequence[int],
        prefixes: Sequence[Prefix | None],
        blocks: Blocks | None = None,
    ) -> torch.Tensor:
        """Prefills rows, see `Rows`."""
        rows, size, _ = embeds.shape
        starts = [0 if prefix is None else prefix.length for prefix in prefixes]
        self.buffers.reserve(len(self) + rows, max([*self.lengths, max(starts) + size]))
        for row, prefix in enumerate(prefixes):
            if prefix is not None:
                layers = [[tensor[None] for tensor in layer] for layer in prefix.layers]
                self.buffers.put(len(self) + row, 0, layers)
        device = embeds.device
        columns = torch.tensor(starts, device=device)[:, None] + torch.arange(size, device=device)
        hidden = self._run(embeds, len(self), columns, max(starts), max(starts) + size, blocks)
        ends = torch.tensor(lengths, device=device) - 1
        self.lengths += [start + length for start, length in zip(starts, lengths, strict=True)]
        return hidden[torch.arange(rows, device=device), ends]

    def repeat(self, row: int, times: int) -> None:
        """Adds copies of a row, see `Rows`."""
        self.buffers.reserve(len(self) + times, max(self.lengths))
        for _ in range(times):
            self.buffers.copy(row, len(self))
            self.lengths.append(self.lengths[row])

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """A decode step, see `Rows`."""
        longest = max(self.lengths)
        self.buffers.reserve(len(self), longest + 1)
        columns = torch.tensor(self.lengths, device=tokens.device)[:, None]
        hidden = self._run(self.llm.embed(tokens[:, None]), 0, columns, longest, longest + 1)
        self.lengths = [length + 1 for length in self.lengths]
        return hidden[:, 0]

    def drop(self, rows: Collection[int]) -> list[int]:
        """Drops rows, see `Rows`. Without any the buffers are released."""
        order = order_after(len(self), rows)
        self.buffers.reorder(order, len(self))
        self.lengths = [self.lengths[row] for row in order]
        if not order:
            self.buffers = RowBuffers()
        return order

    def prefix(self, row: int, length: int) -> Prefix:
        """A copy of a row's beginning, see `Rows`."""
        return Prefix(self.buffers.columns_of(row, length), length)

    def _run(
        self,
        embeds: torch.Tensor,
        first: int,
        columns: torch.Tensor,
        filled: int,
        stop: int,
        blocks: Blocks | None = None,
    ) -> torch.Tensor:
        """Hidden states [B, S, E] of embeds at columns [B, S] of the rows from `first` on.

        `blocks` are as in `join`.
        """
        buffers = self.buffers
        buffers.write_to(first, columns, start=0, filled=filled, stop=stop)
        every = torch.arange(stop, device=columns.device)[None]
        visible = (every[:, None] <= columns[..., None])[:, None]
        if blocks is not None:
            keys = columns.new_zeros(len(columns), stop).scatter_(1, columns, blocks.queries)
            blocks = replace(blocks, keys=keys)
        config = self.llm.model.config
        mask = layer_masks(config, visible, columns, every, embeds.dtype, blocks)
        positions = columns
        if self.llm.longest is not None:
            # Padding may lie behind the last position.
            positions = columns.clamp(max=self.llm.longest - 1)
        return self.llm.body(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{cache_name(): buffers.cache},
        ).last_hidden_state
