"""Buffers of keys and values for rows that join and leave while others are continued.

Shapes: R rows, C columns, G key heads, S new tokens of a row, D head width.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch.nn.functional import pad

from vlm_tune.model.language.masks import Blocks

FIRST_COLUMNS = 64
"""Columns of a new buffer; it doubles when they are full."""


@dataclass(frozen=True)
class Prefix:
    """Keys and values [G, length, D] of a prompt's first tokens, for every layer."""

    layers: Sequence[Sequence[torch.Tensor]]
    length: int

    @property
    def nbytes(self) -> int:
        """The memory that it takes, in bytes."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)


class Branches(Protocol):
    """K branches of each of B rows, which are continued by a token per decode step.

    Attributes:
        hidden: Hidden states [B, K, E] of the branches' last tokens.
    """

    hidden: torch.Tensor

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """A decode step: the hidden states [B, K, E] of the branches' new tokens int64[B, K]."""
        ...

    def select(self, places: torch.Tensor) -> None:
        """Drops all branches but those at `places` int64[B, K']."""
        ...


class Rows(Protocol):
    """Rows that are continued together by a token per decode step, each from a prompt of its own.

    Rows join and leave between any two steps. What a row computes does not depend on the others.

    Attributes:
        takes_prefixes: Whether rows can begin with a `Prefix`.
    """

    takes_prefixes: bool

    def __len__(self) -> int:
        """The number of rows."""
        ...

    def join(
        self,
        embeds: torch.Tensor,
        lengths: Sequence[int],
        prefixes: Sequence[Prefix | None],
        blocks: Blocks | None = None,
    ) -> torch.Tensor:
        """Prefills rows, which follow the present ones.

        Args:
            embeds: Input embeddings [B, S, E], padded on the right.
            lengths: The number of tokens in each of them.
            prefixes: What comes before each of them, if anything. They end with whole blocks.
            blocks: The tokens of them that see each other both ways.

        Returns:
            The hidden states [B, E] of the rows' last tokens.
        """
        ...

    def repeat(self, row: int, times: int) -> None:
        """Adds rows at the end that are copies of a row."""
        ...

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """A decode step: the hidden states [R, E] of the rows' new tokens int64[R]."""
        ...

    def drop(self, rows: Collection[int]) -> list[int]:
        """Drops rows.

        Returns:
            For each row that stays the number that it had.
        """
        ...

    def prefix(self, row: int, length: int) -> Prefix:
        """A copy of the keys and values of a row's first tokens."""
        ...


class RowBuffers:
    """Keys and values [R, G, C, D] of every layer, with room for more rows and columns.

    A forward pass writes into the rows and columns that `write_to` names, through `cache`, a KV
    cache of transformers. What no token was written to is zero, and masked.
    """

    def __init__(self) -> None:
        from transformers import Cache

        self.layers: list[list[torch.Tensor]] = []
        self.room_of_rows = 0
        self.room_of_columns = 0
        # Of the present forward pass: its first row, its columns [B, S], and what it attends to.
        self.first = 0
        self.columns = torch.zeros(0, 0, dtype=torch.int64)
        self.start = 0
        self.filled = 0
        self.stop = 0
        self._cache: Any = Cache(layer_class_to_replicate=cast(Any, self._cache_layer))

    def reserve(self, rows: int, columns: int) -> None:
        """Makes room for so many rows and columns; what lies behind them may be dropped.

        A room that is too small at least doubles, and the other one shrinks to twice what is
        needed: a long row beside few does not get the room of the many rows before it.
        """
        if rows <= self.room_of_rows and columns <= self.room_of_columns:
            return
        columns = max(columns, FIRST_COLUMNS)
        more_rows = _room(rows, self.room_of_rows) - self.room_of_rows
        more_columns = _room(columns, self.room_of_columns) - self.room_of_columns
        for layer in self.layers:
            for place, tensor in enumerate(layer):
                layer[place] = pad(tensor, (0, 0, 0, more_columns, 0, 0, 0, more_rows))
        self.room_of_rows += more_rows
        self.room_of_columns += more_columns

    def write_to(
        self, first: int, columns: torch.Tensor, *, start: int, filled: int, stop: int
    ) -> None:
        """Names where the next forward pass writes.

        Args:
            first: The first of its rows, which are consecutive.
            columns: The columns int64[B, S] of its tokens.
            start: The first column that it attends to.
            filled: The number of columns from there that the model is given as filled.
            stop: The column after the last one that it attends to.
        """
        self.first = first
        self.columns = columns
        self.start = start
        self.filled = filled
        self.stop = stop

    def write(self, number: int, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Writes new keys and values [B, G, S, D] of a layer, and returns what is attended to."""
        layer = self._layer(number, states)
        rows = slice(self.first, self.first + len(self.columns))
        numbers = torch.arange(len(self.columns), device=self.columns.device)[:, None]
        for tensor, new in zip(layer, states, strict=True):
            tensor[rows][numbers, :, self.columns] = new.transpose(1, 2)
        return tuple(tensor[rows, :, self.start : self.stop] for tensor in layer)

    def put(self, first: int, column: int, layers: Sequence[Sequence[torch.Tensor]]) -> None:
        """Copies keys and values [B, G, S, D] of every layer to rows from `first` on."""
        for number, states in enumerate(layers):
            for tensor, new in zip(self._layer(number, states), states, strict=True):
                rows, _, length, _ = new.shape
                tensor[first : first + rows, :, column : column + length] = new

    def _layer(self, number: int, states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The keys and values of a layer, which are allocated for the first new ones."""
        while len(self.layers) <= number:
            self.layers.append([])
        layer = self.layers[number]
        for new in states[len(layer) :]:
            _, heads, _, width = new.shape
            room = (self.room_of_rows, heads, self.room_of_columns, width)
            layer.append(new.new_zeros(room))
        return layer

    def columns_of(self, row: int, length: int) -> list[list[torch.Tensor]]:
        """Copies of a row's first columns [G, length, D], for every layer."""
        return [[tensor[row, :, :length].clone() for tensor in layer] for layer in self.layers]

    def copy(self, source: int, target: int) -> None:
        """Copies a row to another."""
        for layer in self.layers:
            for tensor in layer:
                tensor[target] = tensor[source]

    def reorder(self, order: Sequence[int], count: int) -> None:
        """Moves rows to the places that `order_after` gives them among the first `count`.

        The places behind them are set to zero: a NaN there would reach a later row, though it is
        masked.
        """
        for target, source in enumerate(order):
            if target != source:
                self.copy(source, target)
        for layer in self.layers:
            for tensor in layer:
                tensor[len(order) : count] = 0

    def shift(self, start: int, stop: int) -> None:
        """Moves the columns from `start` to `stop` to the beginning."""
        for layer in self.layers:
            for tensor in layer:
                tensor[:, :, : stop - start] = tensor[:, :, start:stop].clone()

    @property
    def cache(self) -> Any:
        """The KV cache of transformers that writes here; it gets further layers as they come."""
        while len(self._cache.layers) < len(self.layers):
            self._cache.layers.append(self._cache_layer())
        return self._cache

    def _cache_layer(self) -> Any:
        return _layer_class()(self, len(self._cache.layers))


def _room(needed: int, room: int) -> int:
    """The new size of a room: at least what is needed, and at most twice that."""
    return max(needed, 2 * room) if needed > room else min(room, 2 * needed)


@functools.cache
def _layer_class() -> Any:
    from transformers.cache_utils import DynamicLayer

    class BufferedLayer(DynamicLayer):
        """A layer of a transformers cache that is one of `RowBuffers`."""

        def __init__(self, buffers: RowBuffers, number: int) -> None:
            super().__init__()
            self.buffers = buffers
            self.number = number
            self.is_initialized = True

        def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> Any:
            return self.buffers.write(self.number, key_states, value_states)

        def get_seq_length(self) -> int:
            return self.buffers.filled

    return BufferedLayer


def order_after(count: int, dropped: Collection[int]) -> list[int]:
    """For each of the rows that stay of `count` the number that it had.

    The last ones take the places of those that are dropped, so that few rows are copied.
    """
    places = set(dropped)
    stay = count - len(places)
    last = [row for row in range(stay, count) if row not in places]
    return [last.pop() if row in places else row for row in range(stay)]
