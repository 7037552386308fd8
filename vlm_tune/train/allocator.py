"""Settings of memory allocation in a training process.

Three parts: an address range of its own for the tensors of training, the thresholds of glibc's
malloc, and the size of oneDNN's kernel caches.
"""

from __future__ import annotations

import ctypes
import os
import sys

from vlm_tune.kernels.cpu import native
from vlm_tune.resources import KERNELS, SMALLEST_BLOCK

TRIM_THRESHOLD = -1
MMAP_THRESHOLD = -3
"""Parameter numbers of mallopt (malloc.h)."""


def forget_old_kernels() -> None:
    """Limits oneDNN's two CPU kernel caches, unless the environment sets them.

    Must be called before the first matrix product. A batch of a new length compiles new kernels,
    and by default each cache keeps 1,024 of them: on rows of many lengths the process grows by as
    much as its gradients with nearly every step.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS))


_library: ctypes.CDLL | None = None
"""The allocator once the range was opened; never unloaded: it frees the blocks in the range."""


def open_range(smallest: int = SMALLEST_BLOCK) -> bool:
    """Puts new CPU tensors of at least `smallest` bytes into an address range of their own.

    It is done by `kernels/cpu/allocator.cpp`, which needs a C++ compiler and no limit on addresses
    (ulimit -v). Returns False where that is impossible.
    """
    global _library
    _library = _library or native.range_allocator()
    return _library is not None and bool(_library.vlm_tune_open(ctypes.c_int64(smallest)))


def shut_range() -> None:
    """New tensors come from malloc again; pages of the range without live blocks are released."""
    if _library is not None:
        _library.vlm_tune_shut()


def return_freed_memory(smallest: int = 1 << 20) -> bool:
    """Makes glibc's malloc map each block of at least `smallest` bytes alone and unmap it if freed.

    Meant for the time in which a model is built; shuts the range. By default glibc soon takes
    blocks of up to 32 MB from its heap, where casting or copying weights leaves holes between the
    blocks that stay. Returns False without glibc.
    """
    shut_range()
    return _mallopt({MMAP_THRESHOLD: smallest, TRIM_THRESHOLD: smallest})


def keep_freed_memory(largest: int = 1 << 30) -> bool:
    """From now on keeps freed tensors' memory for new ones, in the range or else in glibc's heap.

    Otherwise every activation of some megabytes is mapped again and its pages are faulted in one by
    one, which on a CPU can take longer than the matrix product that fills them. Memory freed before
    goes back to the system. glibc keeps blocks of up to `largest` bytes. Returns False where there
    is neither a range nor glibc.
    """
    opened = open_range()
    return _mallopt({MMAP_THRESHOLD: largest, TRIM_THRESHOLD: -1}) or opened


def trim_heap() -> bool:
    """Returns the unused pages of glibc's heap once, after much work on small objects.

    Returns False without glibc.
    """
    return _mallopt({})


def _mallopt(settings: dict[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is None:
        return False
    libc.malloc_trim(0)
    # A list, not a generator: each is set, also after one that failed.
    done = [bool(mallopt(name, value)) for name, value in settings.items()]
    return all(done)
