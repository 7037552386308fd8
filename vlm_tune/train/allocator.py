"""The C allocator of the process, told that what a training step frees the next one takes again."""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""mallopt's numbers for them (malloc.h)."""


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
