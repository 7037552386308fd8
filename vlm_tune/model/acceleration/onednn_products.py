"""Products of fp32 weights by oneDNN, in inference on a CPU.

torch multiplies fp32 by MKL, which on AMD's processors leaves AVX-512 alone: oneDNN takes half the
time for eight rows and more. A single row waits for the weights' memory either way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from vlm_tune.compat import onednn_linear

FEWEST_ROWS = 8
"""Rows from which on oneDNN is faster."""


class OneDnnProducts(TorchFunctionMode):
    """Context in which this thread's `torch.nn.functional.linear` goes by oneDNN where it helps."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Computes a function of torch."""
        if func is torch.nn.functional.linear and not kwargs and _is_quick(*args):
            return onednn_linear(*args)
        return func(*args, **(kwargs or {}))


def _is_quick(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> bool:
    return (
        torch.is_inference_mode_enabled()
        and rows.device.type == "cpu"
        and all(each is None or each.dtype == torch.float32 for each in (rows, weight, bias))
        and rows.numel() >= FEWEST_ROWS * rows.shape[-1]
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )
