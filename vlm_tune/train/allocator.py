"""Where a process's memory goes: a range of addresses for the tensors of training, what malloc keeps, old compiled kernels."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass

from vlm_tune.kernels.cpu import native
from vlm_tune.resources import KERNELS, SMALLEST_BLOCK

TRIM_THRESHOLD = -1
MMAP_THRESHOLD = -3
"""mallopt's numbers for them (malloc.h)."""


def forget_old_kernels() -> None:
    """Bounds the two caches of oneDNN's kernels on a CPU, unless the environment says otherwise; before the first product.

    A batch of a length not seen before brings kernels of its own, and by default each cache keeps 1,024 of them: a run on
    rows of many lengths grows by as much as its gradients with nearly every step.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS))


@dataclass(frozen=True)
class RangeState:
    """Bytes that live in the range, bytes below the highest address in use since it was last shut, and how many blocks live."""

    live: int
    highest: int
    blocks: int


_library: ctypes.CDLL | None = None
"""The allocator, once the range was open; for ever, because what lies in the range is freed through it."""


def open_range(smallest: int = SMALLEST_BLOCK) -> bool:
    """Puts new CPU tensors of `smallest` bytes and more into a range of addresses of their own; False where there can be none.

    `kernels/cpu/allocator.cpp` does it, which wants a C++ compiler and no limit on addresses (ulimit -v).
    """
    global _library
    _library = _library or native.range_allocator()
    return _library is not None and bool(_library.vlm_tune_open(ctypes.c_int64(smallest)))


def shut_range() -> None:
    """New tensors are malloc's again, and pages of the range that nothing lies on go back to the system."""
    if _library is not None:
        _library.vlm_tune_shut()


def range_state() -> RangeState:
    """How full the range is."""
    found = (ctypes.c_int64 * 3)()
    if _library is not None:
        _library.vlm_tune_state(found)
    return RangeState(*found)


def return_freed_memory(smallest: int = 1 << 20) -> bool:
    """Makes glibc's malloc map blocks of `smallest` bytes and more by themselves and unmap them when freed; False without glibc.

    For the time that a model is made, with the range shut. Left alone glibc soon takes blocks of up to 32 MB from its heap,
    where weights that are cast or copied leave holes between those that stay.
    """
    shut_range()
    return _mallopt({MMAP_THRESHOLD: smallest, TRIM_THRESHOLD: smallest})


def keep_freed_memory(largest: int = 1 << 30) -> bool:
    """Keeps the memory of freed tensors for the next from here on, in the range, or where there is none by glibc; False without both.

    Otherwise every activation of some megabytes is mapped anew and its pages are faulted in one by one, which on a CPU
    can take longer than the matrix product that fills them. What was freed before goes back to the system. glibc keeps
    blocks of up to `largest` bytes.
    """
    opened = open_range()
    return _mallopt({MMAP_THRESHOLD: largest, TRIM_THRESHOLD: -1}) or opened


def trim_heap() -> bool:
    """Returns the pages of glibc's heap that nothing lies on, once: for after much work on small objects; False without glibc."""
    return _mallopt({})


def _mallopt(settings: dict[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is None:
        return False
    libc.malloc_trim(0)
    # Each of them is set, also after one that could not be.
    done = [bool(mallopt(name, value)) for name, value in settings.items()]
    return all(done)
