"""Memory of the process beside tensors: what the C allocator keeps, and compiled kernels of shapes that are gone."""

from __future__ import annotations

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""mallopt's numbers for them (malloc.h)."""

KERNELS = 128
"""Kernels that are kept: some steps' worth, for a step has about thirty kinds of matrix product."""


def forget_old_kernels() -> None:
    """Bounds the two caches of oneDNN's kernels on a CPU, unless the environment says otherwise; before the first product.

    A batch of a length not seen before brings kernels of its own, and by default each cache keeps 1,024 of them: a run on
    rows of many lengths grows by as much as its gradients with nearly every step.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS))


def keep_freed_memory(largest: int = 1 << 30) -> bool:
    """Makes glibc's malloc keep freed blocks of up to `largest` bytes from here on; False where there is no glibc.

    Otherwise every activation of some megabytes is mapped anew and its pages are faulted in one by one, which on a CPU
    can take longer than the matrix product that fills them. What was freed before goes back to the system: what loading
    a model leaves behind is of other sizes, and would stay beside the activations.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is not None:
        libc.malloc_trim(0)
    return mallopt is not None and bool(mallopt(MMAP_THRESHOLD, largest)) and bool(mallopt(TRIM_THRESHOLD, -1))
