"""The dtypes of weights by their names in recipes, and the devices that compute in them."""

from __future__ import annotations

import torch

from vlm_tune.errors import ModelError
from vlm_tune.quoting import quoted

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def dtype_name(dtype: str | torch.dtype | None) -> str | None:
    """Returns the recipe's name of a precision: bf16, fp16 or fp32; None for None.

    Args:
        dtype: that name "bf16", torch's name "bfloat16" or a torch dtype.

    Raises:
        ModelError: the precision is not one of bf16, fp16 and fp32.
    """
    if dtype is None:
        return None
    for name, known in DTYPES.items():
        if (
            isinstance(dtype, str) and dtype in (name, str(known).removeprefix("torch."))
        ) or dtype is known:
            return name
    raise ModelError(f"dtype: there is no {quoted(dtype)}; expected one of {', '.join(DTYPES)}")


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Returns the torch dtype of a precision given as in `dtype_name`; None for None."""
    name = dtype_name(dtype)
    return None if name is None else DTYPES[name]


def device_of(device: str | torch.device | None) -> torch.device | None:
    """Returns the torch device that a user names; None for None.

    Args:
        device: cpu, cuda, cuda:0, ..., or a torch device.

    Raises:
        ModelError: there is no such device.
    """
    if device is None:
        return None
    try:
        if isinstance(device, str | torch.device):
            place = torch.device(device)
            if place.type == "cpu":
                return place
            if place.type == "cuda" and (place.index or 0) < torch.cuda.device_count():
                return place
    except RuntimeError:  # torch knows no such name
        pass
    raise ModelError(
        f"device: there is no {quoted(str(device))}; expected one of "
        f"{', '.join(['cpu', *(f'cuda:{number}' for number in range(torch.cuda.device_count()))])}"
    )


def precision_note(precision: str, device: torch.device) -> str | None:
    """A note for the user on training in a precision on a device; None if there is none.

    Args:
        precision: bf16, fp16 or fp32.
        device: where it is trained.
    """
    if precision != "bf16" or device.type != "cuda":
        return None
    with torch.cuda.device(device):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return None
    return (
        f"{torch.cuda.get_device_name(device)} has no bf16 units and emulates bf16 slowly: "
        "train.precision: fp16 (not for T5) or fp32 is faster"
    )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of the autocast that is at work on a device; None for none."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
