"""Fragmentation of tensor memory, from placing the storages of two steps as training places them.

A hole is left wherever the storage that follows is of another size or lives longer, and none of its
memory is returned to the system or the device.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Any, Literal

from vlm_tune.kernels.cpu import native
from vlm_tune.memory_plan.tracer import Trace
from vlm_tune.resources import SMALLEST_BLOCK

GRAIN = 64
"""Block sizes of our own allocator are multiples of this many bytes (`allocator.cpp`)."""

ASIDE = 112
"""Bytes that glibc needs beside a storage: a header (16), and 64 + 32 to align it to 64."""


Allocator = Literal["range", "malloc", "cuda"]
"""What allocates tensors in training: on a CPU our own range of addresses, or the C library; on a
GPU PyTorch's caching allocator."""


def allocator() -> Literal["range", "malloc"]:
    """The allocator that training on this machine's CPU uses (`train.allocator`)."""
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


SMALL = 1 << 20
"""Largest block of PyTorch's CUDA allocator that comes from segments for small blocks."""
SMALL_SEGMENT = 2 << 20
MEDIUM = 10 << 20
MEDIUM_SEGMENT = 20 << 20
"""Blocks up to `MEDIUM` are cut from segments of `MEDIUM_SEGMENT`, larger ones have their own."""
LARGE_GRAIN = 2 << 20
CUDA_GRAIN = 512
"""Blocks are multiples of `CUDA_GRAIN`, and segments of large ones of `LARGE_GRAIN`."""

Place = tuple[int, int]
"""A block's segment, and its offset in it."""


class Caching:
    """PyTorch's CUDA allocator: best fit in segments that are never given back.

    Small and large blocks have segments of their own (c10/cuda/CUDACachingAllocator.cpp), and what
    is left of a large segment is cut off from 1 MiB on. `largest` counts segments, `fullest` the
    bytes asked for, so their difference has the rounding in it.
    """

    def __init__(self) -> None:
        self.largest = self.live = self.fullest = 0
        self.segments = 0
        self.blocks: dict[Place, tuple[int, int, bool]] = {}
        """Blocks in use: the size asked for, that of the block, and whether it is a small one."""
        self.free: dict[bool, list[tuple[int, int, int]]] = {True: [], False: []}
        """Free blocks, small or large, sorted: size, segment, offset."""
        self.starts: dict[Place, int] = {}
        self.ends: dict[Place, int] = {}
        """The offset at which a free block that starts here ends, and the other way round."""

    def taken(self, size: int) -> int:
        """Bytes to take for a storage."""
        return size

    def take(self, size: int) -> Place:
        """Allocates a block and returns its place."""
        block = -(-size // CUDA_GRAIN) * CUDA_GRAIN
        small = block <= SMALL
        fitting = bisect_left(self.free[small], (block, 0, 0))
        if fitting == len(self.free[small]):
            self._add_segment(block, small)
        room, segment, offset = self.free[small][fitting]
        self._remove(room, segment, offset, small)
        left = room - block
        if left >= CUDA_GRAIN if small else left > SMALL:
            self._add(left, segment, offset + block, small)
            room = block
        self.blocks[segment, offset] = size, room, small
        self.live += size
        self.fullest = max(self.fullest, self.live)
        return segment, offset

    def give(self, place: Place) -> None:
        """Frees the block at a place, and joins it with free neighbours."""
        segment, offset = place
        size, room, small = self.blocks.pop(place)
        self.live -= size
        end = offset + room
        if (after := self.starts.get((segment, end))) is not None:
            self._remove(after - end, segment, end, small)
            end = after
        if (before := self.ends.get((segment, offset))) is not None:
            self._remove(offset - before, segment, before, small)
            offset = before
        self._add(end - offset, segment, offset, small)

    def _add_segment(self, block: int, small: bool) -> None:
        if small:
            size = SMALL_SEGMENT
        elif block < MEDIUM:
            size = MEDIUM_SEGMENT
        else:
            size = -(-block // LARGE_GRAIN) * LARGE_GRAIN
        self._add(size, self.segments, 0, small)
        self.segments += 1
        self.largest += size

    def _add(self, room: int, segment: int, offset: int, small: bool) -> None:
        insort(self.free[small], (room, segment, offset))
        self.starts[segment, offset] = offset + room
        self.ends[segment, offset + room] = offset

    def _remove(self, room: int, segment: int, offset: int, small: bool) -> None:
        self.free[small].remove((room, segment, offset))
        del self.starts[segment, offset], self.ends[segment, offset + room]


def holes(trace: Trace, placed_by: Allocator, *, accumulating: bool) -> int:
    """Idle bytes between storages, over two steps of a trace: peak memory less peak live bytes."""
    heap: Any = {"range": Range, "malloc": Glibc, "cuda": Caching}[placed_by]()
    places: dict[object, Any] = {}
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
