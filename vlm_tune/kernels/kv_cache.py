"""The KV cache of rows and of the branches that continue them.

Shapes: B rows, K branches of a row, H query heads, G key heads, L tokens, D head width.
"""

from __future__ import annotations

import itertools
from typing import ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

Layer = tuple[Tensor, Tensor]
"""Keys and values of one layer."""


class KVCache:
    """Keys and values of one generation: those of its rows, then those of its decode steps.

    A prefill appends the rows' keys and values, layer by layer. After `branch`, each pass through
    the layers is a decode step of all branches.

    An operator's arguments are tensors, so a cache is passed to `interval_attention` by its
    `handle`; compiled code then has one graph for all caches, whatever their sizes.

    Attributes:
        handle: int64[1] on the CPU, the number by which `of` returns this cache.
        rows: Keys and values [B, G, L, D] of the rows, for every layer.
        steps: For every layer, the keys and values [B, G, K, D] of each decode step.
        visible: bool[B, K, L], the tokens of its row that each branch sees; None in the prefill.
    """

    _numbers: ClassVar = itertools.count(1)
    _open: ClassVar[WeakValueDictionary[int, KVCache]] = WeakValueDictionary()

    def __init__(self) -> None:
        number = next(self._numbers)
        self.handle = torch.tensor([number])
        self.rows: list[Layer] = []
        self.steps: list[list[Layer]] = []
        self.visible: Tensor | None = None
        self._calls = 0
        self._open[number] = self

    @classmethod
    def of(cls, handle: Tensor) -> KVCache:
        """The cache with this handle. Raises `KeyError` if it is not in use any more."""
        return cls._open[int(handle)]

    def branch(self, visible: Tensor) -> None:
        """Ends the prefill: the next calls are decode steps of K branches.

        `visible` is bool[B, K, L], the tokens of its row that each branch sees.
        """
        self.visible = visible.contiguous()
        self.steps = [[] for _ in self.rows]

    def prefill(self, key: Tensor, value: Tensor) -> None:
        """Appends the rows' keys and values [B, G, L, D] of the next layer."""
        self.rows.append((key.clone(), value.clone()))

    def decode(self, key: Tensor, value: Tensor) -> tuple[Layer, list[Layer]]:
        """Appends a decode step's keys and values [B, G, K, D] of the next layer.

        Layers must be called in their order.

        Returns:
            The layer's keys and values of the rows, and those of all its decode steps.
        """
        layer = self._calls % len(self.rows)
        self._calls += 1
        self.steps[layer].append((key.clone(), value.clone()))
        return self.rows[layer], self.steps[layer]

    def select(self, places: Tensor) -> None:
        """Drops all branches but those at `places` int64[B, K']."""
        assert self.visible is not None
        rows = torch.arange(len(places), device=places.device)[:, None]
        self.visible = self.visible[rows, places]
        self.steps = [
            [
                (key[rows, :, places].transpose(1, 2), value[rows, :, places].transpose(1, 2))
                for key, value in layer
            ]
            for layer in self.steps
        ]
