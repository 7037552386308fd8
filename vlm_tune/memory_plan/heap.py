"""Fragmentation of tensor memory, from placing the storages of two steps as training places them.

A hole is left wherever the storage that follows is of another size or lives longer, and none of its
pages is returned to the system.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Literal

from vlm_tune.kernels.cpu import native
from vlm_tune.memory_plan.tracer import Trace
from vlm_tune.resources import SMALLEST_BLOCK

GRAIN = 64
"""Block sizes of our own allocator are multiples of this many bytes (`allocator.cpp`)."""

ASIDE = 112
"""Bytes that glibc needs beside a storage: a header (16), and 64 + 32 to align it to 64."""


Allocator = Literal["range", "malloc"]
"""What allocates a CPU's tensors in training: our own range of addresses, or the C library."""


def allocator() -> Allocator:
    """The allocator that training on this machine uses (`train.allocator`)."""
    return "malloc" if native.range_allocator() is None else "range"


class Range:
    """First fit from the lowest address, with adjacent holes joined, as in `allocator.cpp`."""

    def __init__(self) -> None:
        self.top = self.largest = self.live = self.fullest = 0
        self.holes: list[tuple[int, int]] = []
        """Address and size of each, sorted by address."""
        self.blocks: dict[int, int] = {}

    def taken(self, size: int) -> int:
        """Bytes of the block for a storage of `size` bytes; 0 if it is allocated elsewhere."""
        return -(-size // GRAIN) * GRAIN if size >= SMALLEST_BLOCK else 0

    def fitting(self, size: int) -> int | None:
        """The index of the hole that a block is put into, None if there is none."""
        return next((number for number, (_, hole) in enumerate(self.holes) if hole >= size), None)

    def take(self, size: int) -> int:
        """Allocates a block and returns its address."""
        number = self.fitting(size)
        if number is None:
            place = self.top
            self.top = self.top + size
            self.largest = max(self.largest, self.top)
        else:
            place, hole = self.holes[number]
            self.holes[number : number + 1] = [(place + size, hole - size)] if hole > size else []
        self.blocks[place] = size
        self.live += size
        self.fullest = max(self.fullest, self.live)
        return place

    def give(self, place: int) -> None:
        """Frees the block at an address."""
        size = self.blocks.pop(place)
        self.live -= size
        number = bisect_left(self.holes, (place, 0))
        if number < len(self.holes) and self.holes[number][0] == place + size:
            size += self.holes.pop(number)[1]
        if number and sum(self.holes[number - 1]) == place:
            place, before = self.holes.pop(number - 1)
            size = size + before
            number = number - 1
        if place + size == self.top:
            self.top = place
        else:
            self.holes.insert(number, (place, size))


class Glibc(Range):
    """Best fit, as glibc's malloc works while freed memory is not returned.

    What malloc cuts off a block for other uses is not modelled.
    """

    def taken(self, size: int) -> int:
        return size + ASIDE

    def fitting(self, size: int) -> int | None:
        return min(
            ((hole, number) for number, (_, hole) in enumerate(self.holes) if hole >= size),
            default=(0, None),
        )[1]


def holes(trace: Trace, placed_by: Allocator, *, accumulating: bool) -> int:
    """Idle bytes between storages, over two steps of a trace: peak memory less peak live bytes."""
    heap = Range() if placed_by == "range" else Glibc()
    places: dict[object, int] = {}
    for key, size in _two_steps(trace, accumulating=accumulating):
        if size is None:
            if key in places:
                heap.give(places.pop(key))
        elif taken := heap.taken(size):
            places[key] = heap.take(taken)
    return heap.largest - heap.fullest


def _two_steps(trace: Trace, *, accumulating: bool) -> Iterator[tuple[object, int | None]]:
    """Allocations (key and size) and releases (key and None) of two steps.

    AdamW's states are allocated in the first step and exist in the second.
    """
    gradients = [number for number, kind in enumerate(trace.kinds) if kind == "gradients"]
    persistent = set(gradients)
    sizes = trace.sizes
    for step in range(2):
        for micro in range(1 + accumulating):
            alive = set()
            for event in trace.events:
                number = abs(event)
                if number not in persistent:
                    yield number, sizes[number] if event > 0 else None
                    alive ^= {number}
                elif event > 0:
                    # With accumulation it is added to the gradient that exists.
                    yield (number, micro), sizes[number]
                    if micro:
                        yield (number, micro), None
            yield from ((number, None) for number in sorted(alive))
        for number in gradients if step == 0 else ():
            yield from ((("state", moment, number), sizes[number]) for moment in range(2))
        yield from (((number, 0), None) for number in gradients)
