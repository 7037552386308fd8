"""Checks of the devices of an operator's tensors."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


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
