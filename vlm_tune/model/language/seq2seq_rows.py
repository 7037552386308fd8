"""Rows of an encoder-decoder that join and leave while they are continued.

A decoder with relative positions knows only how far a token is from another. So all rows write a
step's tokens to the same column, whenever they joined, and a row does not see the columns before
its first token.

Shapes: R rows, B rows that join, L tokens of a prompt, C columns, E width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vlm_tune.compat import cache_name
from vlm_tune.model.language.masks import Blocks, additive
from vlm_tune.model.language.row_buffers import Prefix, RowBuffers, order_after

if TYPE_CHECKING:
    from vlm_tune.model.language.seq2seq import Seq2SeqLLM


class Seq2SeqRows:
    """Answers of an encoder-decoder to one encoded prompt each, see `Rows`."""

    takes_prefixes = False

    def __init__(self, llm: Seq2SeqLLM) -> None:
        self.llm = llm
        self._reset()

    def _reset(self) -> None:
        # For each row, its first column and the length of its prompt.
        self.starts: list[int] = []
        self.lengths: list[int] = []
        self.filled = 0
        self.growing = RowBuffers()
        self.cross = RowBuffers()

    def __len__(self) -> int:
        return len(self.starts)

    def join(
        self,
        embeds: torch.Tensor,
        lengths: Sequence[int],
        prefixes: Sequence[Prefix | None],
        blocks: Blocks | None = None,
    ) -> torch.Tensor:
        """Encodes prompts and takes their first decode step, see `Rows`."""
        rows, size, _ = embeds.shape
        ends = torch.tensor(lengths, device=embeds.device)[:, None]
        row_mask = torch.arange(size, device=embeds.device) < ends
        encoded = self.llm.encoded(embeds, row_mask, 1)
        cache: Any = encoded.cache
        first = len(self)
        # The first token goes beside the present rows' last ones.
        self.filled = max(self.filled, 1)
        self.growing.reserve(first + rows, self.filled)
        self.growing.put(
            first,
            self.filled - 1,
            [
                (layer.keys[:, :, :1], layer.values[:, :, :1])
                for layer in cache.self_attention_cache.layers
            ],
        )
        self.cross.reserve(first + rows, max([*self.lengths, size]))
        self.cross.put(
            first,
            0,
            [(layer.keys, layer.values) for layer in cache.cross_attention_cache.layers],
        )
        self.starts += [self.filled - 1] * rows
        self.lengths += lengths
        return encoded.hidden[:, 0]

    def repeat(self, row: int, times: int) -> None:
        """Adds copies of a row, see `Rows`."""
        for buffers, columns in ((self.growing, self.filled), (self.cross, max(self.lengths))):
            buffers.reserve(len(self) + times, columns)
            for number in range(times):
                buffers.copy(row, len(self) + number)
        self.starts += [self.starts[row]] * times
        self.lengths += [self.lengths[row]] * times

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """A decode step, see `Rows`."""
        self._make_room()
        device = tokens.device
        rows = len(self)
        start = min(self.starts)
        column = self.filled
        self.growing.write_to(
            0,
            torch.full((rows, 1), column, device=device),
            start=start,
            filled=column - start,
            stop=column + 1,
        )
        dtype = self.cross.layers[0][0].dtype
        columns = torch.arange(start, column + 1, device=device)
        visible = columns >= torch.tensor(self.starts, device=device)[:, None]
        longest = max(self.lengths)
        prompts = torch.arange(longest, device=device)
        cross_visible = prompts < torch.tensor(self.lengths, device=device)[:, None]
        hidden = self.llm.model.get_decoder()(
            input_ids=tokens[:, None],
            attention_mask=additive(visible[:, None, None], dtype),
            # Their keys and values are in the cache: no layer reads the encoder's output.
            encoder_hidden_states=torch.zeros(1, 1, 1, dtype=dtype, device=device).expand(
                rows, longest, self.llm.width
            ),
            encoder_attention_mask=additive(cross_visible[:, None, None], dtype),
            use_cache=True,
            **{cache_name(): self._cache(longest)},
        ).last_hidden_state
        self.filled += 1
        return hidden[:, 0]

    def _make_room(self) -> None:
        """Makes room for a column: where half of them are no row's any more, by moving the rest."""
        start = min(self.starts)
        if self.filled == self.growing.room_of_columns and 2 * start >= self.filled:
            self.growing.shift(start, self.filled)
            self.starts = [column - start for column in self.starts]
            self.filled -= start
        self.growing.reserve(len(self), self.filled + 1)

    def _cache(self, longest: int) -> Any:
        """The cache of transformers: what grows, and the prompts' keys and values."""
        from transformers import Cache, EncoderDecoderCache
        from transformers.cache_utils import DynamicLayer

        cross: list[Any] = []
        for tensors in self.cross.layers:
            layer = DynamicLayer()
            layer.keys, layer.values = (tensor[: len(self), :, :longest] for tensor in tensors)
            layer.is_initialized = True
            cross.append(layer)
        return EncoderDecoderCache(self.growing.cache, Cache(layers=cross))

    def drop(self, rows: Collection[int]) -> list[int]:
        """Drops rows, see `Rows`. Without any the buffers are released."""
        order = order_after(len(self), rows)
        for buffers in (self.growing, self.cross):
            buffers.reorder(order, len(self))
        self.starts = [self.starts[row] for row in order]
        self.lengths = [self.lengths[row] for row in order]
        if not order:
            self._reset()
        return order

    def prefix(self, row: int, length: int) -> Prefix:
        """An encoder-decoder has none: each of a prompt's tokens sees those that follow."""
        raise NotImplementedError
