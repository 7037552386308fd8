"""The C allocator of the process, told that what a training step frees the next one takes again."""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""mallopt's numbers for them (malloc.h)."""


def keep_freed_memory(largest: int = 1 << 30) -> bool:
    """Makes glibc's malloc keep freed blocks of up to `largest` bytes for the process; False where there is no glibc.

    Otherwise every activation of some megabytes is mapped anew and its pages are faulted in one by one, which on a CPU
    can take longer than the matrix product that fills them.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(MMAP_THRESHOLD, largest)) and bool(mallopt(TRIM_THRESHOLD, -1))
