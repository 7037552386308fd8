"""A pretended GPU: tensors that say they are on another device, and are computed on the CPU.

Unlike those of fake tensors, their values are real. So all that depends on values runs, outputs can
be compared with a CPU's, and code takes the paths that it takes on a GPU. An operator that gets a
tensor of the GPU and one of the host raises an error as CUDA does, and so does one whose index is
on the host, which CUDA would copy, unless that is allowed. CUDA's autocast can be used.

Backward passes need a thread for a device of the kind cuda, and there is none without a GPU. They
run on a pretended meta device, whose code takes all the paths of a GPU's but those that ask for
`cuda` by name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

CUDA = torch.device("cuda:0")
META = torch.device("meta")
MOVES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
"""Operators that take tensors of two devices."""
PINS = (torch.ops.aten.pin_memory.default, torch.ops.aten._pin_memory.default)
"""Operators that pin a tensor of the host, for which there is no driver."""
INDEXED = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
)
"""Operators whose second argument, the indices, CUDA copies from the host."""
_copies_indices = ContextVar("_copies_indices", default=False)


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
    copied = args[1] if func in INDEXED and _copies_indices.get() else ()
    on_host = [
        each
        for each in tensors
        if each.device.type == "cpu" and each.dim() and not any(each is one for one in copied)
    ]
    if place is not None and on_host and func not in MOVES:
        shapes = ", ".join(str(tuple(each.shape)) for each in on_host)
        raise RuntimeError(f"{func} got tensors of the GPU and, from the host, {shapes}")
    if (
        func is torch.ops.aten.cumsum.default
        and place is not None
        and args[0].is_floating_point()
        and torch.are_deterministic_algorithms_enabled()
    ):
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
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


_tensor = torch.tensor


def _new_tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
    """`torch.tensor`, by an operator that moves the values: to `meta` they would be lost."""
    if isinstance(data, list):
        data = tree_map_only(torch.Tensor, lambda each: each.item(), data)
    tensor = _tensor(data, **options)
    return tensor if device is None else tensor.to(device)


_is_enabled = torch.is_autocast_enabled


def _autocasts(kind: str | None = None) -> bool:
    """`torch.is_autocast_enabled`, which knows no autocast of `meta`."""
    if kind == "meta":
        return False
    return _is_enabled() if kind is None else _is_enabled(kind)


@contextmanager
def _autocast() -> Iterator[None]:
    """Context in which CUDA's autocast is not switched off for lack of a GPU."""
    with (
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        patch("torch.cuda.is_bf16_supported", lambda **_: True),
        patch("torch.is_autocast_enabled", _autocasts),
    ):
        yield


@contextmanager
def pretended(
    model: nn.Module, device: torch.device, *, copies_indices: bool = False
) -> Iterator[None]:
    """Context in which tensors can be on pretended devices, and a model's are on one of them.

    Shared parameters stay shared. Afterwards the model has its own tensors again. With
    `copies_indices` an index may be on the host, as in code of other libraries.
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
    copying = _copies_indices.set(copies_indices)
    try:
        with mode, patch("torch.tensor", _new_tensor), _autocast():
            for tensors, before in before_placing:
                for name, tensor in before.items():
                    if tensor is not None and id(tensor) not in placed:
                        wrapped: Any = PretendedTensor(tensor.detach(), device)
                        if isinstance(tensor, nn.Parameter):
                            wrapped = nn.Parameter(wrapped, tensor.requires_grad)
                        if hasattr(tensor, "quant_state"):
                            # bitsandbytes moves it with the weight.
                            wrapped.quant_state = copy.deepcopy(tensor.quant_state)
                            wrapped.quant_state.to(device)
                        placed[id(tensor)] = wrapped
                    tensors[name] = None if tensor is None else placed[id(tensor)]
            yield
    finally:
        _copies_indices.reset(copying)
        torch._C._set_only_lift_cpu_tensors(lifts_from_host)
        for tensors, before in before_placing:
            tensors.update(before)


def _tensors(model: nn.Module) -> list[dict[str, Any]]:
    """The dictionaries of parameters and of buffers of all modules."""
    return [
        tensors for module in model.modules() for tensors in (module._parameters, module._buffers)
    ]
