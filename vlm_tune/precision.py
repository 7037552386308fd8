"""The dtypes of weights by their names in recipes."""

from __future__ import annotations

import torch

from vlm_tune.errors import ModelError
from vlm_tune.quoting import quoted

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def dtype_name(dtype: str | torch.dtype | None) -> str | None:
    """Returns the recipe's name of a precision: bf16, fp16 or fp32; None for None.

    Args:
        dtype: that name ("bf16"), torch's name ("bfloat16") or a torch dtype.

    Raises:
        ModelError: the precision is none of bf16, fp16 and fp32.
    """
    if dtype is None:
        return None
    for name, known in DTYPES.items():
        if (
            isinstance(dtype, str) and dtype in (name, str(known).removeprefix("torch."))
        ) or dtype is known:
            return name
    raise ModelError(f"dtype: there is no {quoted(dtype)}; there are {', '.join(DTYPES)}")


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Returns the torch dtype of a precision given as in `dtype_name`; None for None."""
    name = dtype_name(dtype)
    return None if name is None else DTYPES[name]
