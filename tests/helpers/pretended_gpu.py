"""A pretended GPU: tensors that say they are on another device, and are computed on the CPU.

Unlike those of fake tensors, their values are real. So all that depends on values runs, outputs can
be compared with a CPU's, and code takes the paths that it takes on a GPU. An operator that gets a
tensor of the GPU and one of the host raises an error as CUDA does, and so does one whose index is
on the host, which CUDA would copy.

Backward passes need a thread for a device of the kind cuda, and there is none without a GPU. They
run on a pretended meta device, whose code takes all the paths of a GPU's but those that ask for
`cuda` by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

CUDA = torch.device("cuda:0")
META = torch.device("meta")
MOVES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
"""Operators that take tensors of two devices."""
PINS = (torch.ops.aten.pin_memory.default, torch.ops.aten._pin_memory.default)
"""Operators that pin a tensor of the host, for which there is no driver."""


class PretendedTensor(torch.Tensor):
    """A tensor on a pretended device; `host` has its values."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor, device: torch.device) -> PretendedTensor:
        wrapper: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=device,
        )
        wrapper.host = host
        return wrapper

    def __repr__(self, **_: Any) -> str:
        return f"PretendedTensor({self.host!r})"

    def tolist(self) -> Any:
        return self.host.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The outputs of an operator, on the device on which it would run."""
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
    pretended = [each.device for each in tensors if isinstance(each, PretendedTensor)]
    place = pretended[0] if pretended else None
    on_host = [each for each in tensors if each.device.type == "cpu" and each.dim()]
    if place is not None and on_host and func not in MOVES:
        shapes = ", ".join(str(tuple(each.shape)) for each in on_host)
        raise RuntimeError(f"{func} got tensors of the GPU and, from the host, {shapes}")
    if (device := kwargs.get("device")) is not None:
        place = {"cuda": CUDA, "meta": META}.get(torch.device(device).type)
        kwargs = {**kwargs, "device": "cpu"}
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    inner_args, inner_kwargs = tree_map_only(torch.Tensor, _host, (args, kwargs))
    # An inference tensor can't wrap a view of another tensor.
    with torch.inference_mode(False), torch.no_grad():
        output = func(*inner_args, **inner_kwargs)
        if func is torch.ops.aten.copy_.default:
            return args[0]
        if place is None:
            return output
        wrapped = tree_map_only(torch.Tensor, lambda each: PretendedTensor(each, place), output)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _host(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor."""
    if isinstance(tensor, PretendedTensor):
        return tensor.host
    if not tensor.is_meta:
        return tensor
    # `torch.tensor([], device="meta")` does not go by an operator.
    assert not tensor.numel(), "its values are lost"
    return torch.empty(tensor.shape, dtype=tensor.dtype)


class _Placing(TorchDispatchMode):
    """Gives tensors that are created on `cuda` or `meta` to the pretended devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PINS:
            return args[0].clone()
        with self:  # in inference mode, operators that are made of others arrive whole
            output = func.decompose(*args, **(kwargs or {}))
        return _computed(func, args, kwargs or {}) if output is NotImplemented else output


class _Making(TorchFunctionMode):
    """Has `torch.tensor` move values to `meta` by an operator: else they are lost."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func is torch.tensor and device is not None and torch.device(device).type == "meta":
            return func(*args, **{**kwargs, "device": "cpu"}).to(device)
        return func(*args, **kwargs)


@contextmanager
def pretended(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Context in which tensors can be on pretended devices, and a model's are on one of them.

    Shared parameters stay shared. Afterwards the model has its own tensors again.
    """
    torch._C._ensureCUDADeviceGuardSet()
    mode: Any = _Placing()
    # As a mode of fake tensors it keeps torch from looking for a driver.
    mode._mode_key = torch._C._TorchDispatchModeKey.FAKE
    # `torch.tensor` then moves what it makes by an operator, which the mode sees.
    lifts_from_host = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    before_placing = [(tensors, dict(tensors)) for tensors in _tensors(model)]
    placed: dict[int, Any] = {}
    try:
        # For CUDA it is not needed, and functions of torch round otherwise under such a mode.
        with mode, _Making() if device.type == "meta" else nullcontext():
            for tensors, before in before_placing:
                for name, tensor in before.items():
                    if tensor is not None and id(tensor) not in placed:
                        wrapped: Any = PretendedTensor(tensor.detach(), device)
                        if isinstance(tensor, nn.Parameter):
                            wrapped = nn.Parameter(wrapped, tensor.requires_grad)
                        placed[id(tensor)] = wrapped
                    tensors[name] = None if tensor is None else placed[id(tensor)]
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts_from_host)
        for tensors, before in before_placing:
            tensors.update(before)


def _tensors(model: nn.Module) -> list[dict[str, Any]]:
    """The dictionaries of parameters and of buffers of all modules."""
    return [
        tensors for module in model.modules() for tensors in (module._parameters, module._buffers)
    ]
