"""How much larger the C heap gets than what lives on it: a step's storages put where glibc's malloc would put them.

While freed memory is kept (`train.allocator`) a storage takes the smallest hole that it fits in, and new memory where none
does. A hole is left over wherever what comes after a storage is of another size or lives longer, and no page of it goes back.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from vlm_tune.model.tracing import Trace

ASIDE = 112
"""Bytes that glibc asks for beside a storage: its header (16), and to find an address that 64 divides (64 + 32)."""


class _Heap:
    """Best fit, with holes joined to their neighbours."""

    def __init__(self) -> None:
        self.top = self.largest = self.live = self.fullest = 0
        self.holes: list[tuple[int, int]] = []
        self.sizes: dict[int, int] = {}
        self.ends: dict[int, int] = {}

    def take(self, size: int) -> tuple[int, int]:
        """Where a block comes to lie, and its size."""
        place = bisect_left(self.holes, (size, 0))
        if place < len(self.holes):
            hole, start = self.holes[place]
            self._fill(start, hole)
            if hole > size:
                self._leave(start + size, hole - size)
        else:
            start, self.top = self.top, self.top + size
            self.largest = max(self.largest, self.top)
        self.live += size
        self.fullest = max(self.fullest, self.live)
        return start, size

    def give(self, start: int, size: int) -> None:
        """Frees a block."""
        self.live -= size
        before = self.ends.get(start)
        if before is not None:
            size += self.sizes[before]
            self._fill(before, self.sizes[before])
            start = before
        after = self.sizes.get(start + size)
        if after is not None:
            self._fill(start + size, after)
            size += after
        if start + size == self.top:
            self.top = start
        else:
            self._leave(start, size)

    def _leave(self, start: int, size: int) -> None:
        insort(self.holes, (size, start))
        self.sizes[start], self.ends[start + size] = size, start

    def _fill(self, start: int, size: int) -> None:
        del self.holes[bisect_left(self.holes, (size, start))], self.sizes[start], self.ends[start + size]


def heap_growth(trace: Trace) -> float:
    """The heap's largest size in a step over the most that lives on it at once, at least 1."""
    heap, blocks = _Heap(), {}
    for event in trace.events:
        if event > 0:
            blocks[event] = heap.take(trace.sizes[event] + ASIDE)
        elif -event in blocks:
            heap.give(*blocks.pop(-event))
    return heap.largest / max(heap.fullest, 1)
