"""Memory of the process beside tensors: what the C allocator keeps, and compiled kernels of shapes that are gone."""

from __future__ import annotations

import ctypes
import os
import sys

from vlm_tune.resources import KERNELS

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""mallopt's numbers for them (malloc.h)."""


def forget_old_kernels() -> None:
    """Bounds the two caches of oneDNN's kernels on a CPU, unless the environment says otherwise; before the first product.

    A batch of a length not seen before brings kernels of its own, and by default each cache keeps 1,024 of them: a run on
    rows of many lengths grows by as much as its gradients with nearly every step.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS))


def return_freed_memory(smallest: int = 1 << 20) -> bool:
    """Makes glibc's malloc map blocks of `smallest` bytes and more by themselves and unmap them when freed; False without glibc.

    For the time that a model is made. Left alone glibc soon takes blocks of up to 32 MB from its heap, where weights that
    are cast or copied leave holes between those that stay.
    """
    return _mallopt({MMAP_THRESHOLD: smallest, TRIM_THRESHOLD: smallest})


def keep_freed_memory(largest: int = 1 << 30) -> bool:
    """Makes glibc's malloc keep freed blocks of up to `largest` bytes from here on; False where there is no glibc.

    Otherwise every activation of some megabytes is mapped anew and its pages are faulted in one by one, which on a CPU
    can take longer than the matrix product that fills them. What was freed before goes back to the system.
    """
    return _mallopt({MMAP_THRESHOLD: largest, TRIM_THRESHOLD: -1})


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
