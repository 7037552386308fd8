"""How full the address range of training's tensors is (`vlm_tune.train.allocator`)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from vlm_tune.kernels.cpu import native


@dataclass(frozen=True)
class RangeState:
    """Bytes of live blocks, bytes below the highest address in use since the range was last shut,
    and the number of live blocks.
    """

    live: int
    highest: int
    blocks: int


def range_state() -> RangeState:
    """The present state; all zeros where the range was never opened."""
    figures = (ctypes.c_int64 * 3)()
    library = native.range_allocator()
    if library is not None:
        library.vlm_tune_state(figures)
    return RangeState(*figures)
