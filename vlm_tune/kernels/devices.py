"""The devices that operators are for, and checks of the devices of their tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def by_operator(device: torch.device) -> bool:
    """Whether LoRA layers, MLPs and decoder layers on a device go by operators.

    These have kernels for CPUs alone. On other devices a compiler is given tensor code that it can
    trace and fuse: LoRA layers are `traceable`, and the rest is transformers' own code over them.
    """
    return device.type == "cpu"


def check_devices(operator: str, tensors: Iterable[Tensor | None]) -> None:
    """Checks that all tensors are on one device.

    Raises:
        ValueError: They are not. Kernels read addresses, so a tensor of another device would be
            read as whatever lies at its address here.
    """
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise ValueError(f"{operator} takes tensors of one device, got {names}")
