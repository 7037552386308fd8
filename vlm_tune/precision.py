"""The number types of weights, by their names in recipes."""

from __future__ import annotations

import torch

from vlm_tune.errors import ModelError
from vlm_tune.quoting import quoted

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def dtype_name(dtype: str | torch.dtype | None) -> str | None:
    """The name that recipes have for a precision, given by that name ("bf16"), by torch's ("bfloat16") or as torch's type.

    None for None; raises `ModelError` for what is none of bf16, fp16 and fp32.
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
    """The torch type of a precision that is given as in `dtype_name`."""
    name = dtype_name(dtype)
    return None if name is None else DTYPES[name]
