"""A CUDA device in name that computes on the CPU, and counts when the host would wait for it.

Its tensors have values, so whole training steps run on it, their backward passes too, in a process
without a GPU. (A fake CUDA tensor has none: a step that reads one can't go on, and without a GPU
autograd refuses its backward pass.) To Python their device is cuda:0; to torch's C++ it is meta,
which autograd takes everywhere.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

CUDA = torch.device("cuda", 0)
READS = {
    "_local_scalar_dense",
    "nonzero",
    "nonzero_static",
    "masked_select",
    "masked_scatter_backward",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal",
    "is_nonzero",
    "bincount",
}
"""Operators of ATen whose output's size, or value, the host has to know."""


class DeviceTensor(torch.Tensor):
    """A tensor on the counted device; `backing` is the CPU tensor that holds its values."""

    backing: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, backing: torch.Tensor) -> DeviceTensor:
        wrapped = torch.Tensor._make_wrapper_subclass(
            cls,
            backing.shape,
            strides=backing.stride(),
            storage_offset=backing.storage_offset(),
            dtype=backing.dtype,
            device=torch.device("meta"),
        )
        wrapped.backing = backing
        return wrapped

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def record_stream(self, s: Any) -> None:  # type: ignore[override]
        assert isinstance(s, _Stream)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.backing!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the counted device")


class _Stream:
    """A stream of the counted device, which computes everything in order."""

    def __init__(self, device: torch.device) -> None:
        assert device == CUDA

    def wait_stream(self, stream: _Stream) -> None:
        pass


class CountedDevice(TorchDispatchMode):
    """Runs operators of the device's tensors, and notes each at which the host would wait.

    `waits` holds a line for each: the operator, and the line of Python that called it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.pinned: set[int] = set()
        self._alive: list[torch.Tensor] = []

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """A pinned copy of a CPU tensor; itself if it is pinned."""
        if id(tensor) not in self.pinned:
            tensor = tensor.clone()
            self.pinned.add(id(tensor))
            self._alive.append(tensor)  # no other tensor may get its id
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.is_inference_mode_enabled():
            with self:  # operators that are made of others arrive whole
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        tensors = [
            each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)
        ]
        there = any(isinstance(each, DeviceTensor) for each in tensors)
        target = kwargs.get("device")
        moves = target is not None and torch.device(target).type in ("cuda", "meta")
        name = func._schema.name.removeprefix("aten::")
        if self._waits(name, args, kwargs, there, moves):
            self.waits.append(f"{name} at {_caller()}")
        if there:
            self._check_devices(name, tensors)
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("non_blocking", None) if name == "_to_copy" else None
        with _disable_current_modes(), _no_inference_tensors():
            output = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        stays = moves or (there and not (target is not None and not moves))
        if name == "copy_":
            return args[0]
        with _no_inference_tensors():
            return self._wrapped(output, args, kwargs) if stays else output

    def _waits(
        self, name: str, args: Any, kwargs: dict[str, Any], there: bool, moves: bool
    ) -> bool:
        """Whether the host has to wait in an operator."""
        if name in ("_to_copy", "copy_"):
            source, goal = (args[0], moves) if name == "_to_copy" else (args[1], _is_there(args[0]))
            if (name == "_to_copy" and kwargs.get("device") is None) or not source.numel():
                return False
            blocking = not (
                kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            )
            if _is_there(source):
                return not goal
            return goal and (blocking or id(source) not in self.pinned)
        if not there:
            return False
        if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            return self._index_waits(name, args)
        if name == "repeat_interleave":
            return kwargs.get("output_size") is None and isinstance(args[-1], torch.Tensor)
        return name in READS

    def _index_waits(self, name: str, args: Any) -> bool:
        """Whether an index is a mask, whose places are counted, or lies on the host."""
        indices = [each for each in args[1] if each is not None]
        fills = name != "index" and args[2].numel() == 1 and not (len(args) > 3 and args[3])
        masks = any(each.dtype in (torch.bool, torch.uint8) for each in indices)
        return (masks and not fills) or any(not _is_there(each) for each in indices)

    def _check_devices(self, name: str, tensors: list[torch.Tensor]) -> None:
        if name in ("_to_copy", "copy_", "index", "index_put", "index_put_"):
            return
        strays = [each for each in tensors if not _is_there(each) and each.dim()]
        assert not strays, f"{name} at {_caller()}: a tensor of {strays[0].shape} is on the CPU"

    def _wrapped(self, output: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The output with its tensors on the device; those that were passed in stay the same."""
        same = {
            id(each.backing): each
            for each in tree_flatten((args, kwargs))[0]
            if isinstance(each, DeviceTensor)
        }

        def wrap(each: Any) -> Any:
            if not isinstance(each, torch.Tensor) or isinstance(each, DeviceTensor):
                return each
            return same[id(each)] if id(each) in same else DeviceTensor(each)

        return tree_map(wrap, output)


@contextlib.contextmanager
def _no_inference_tensors() -> Iterator[None]:
    """An inference tensor can't wrap a view of another tensor."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _is_there(tensor: Any) -> bool:
    return isinstance(tensor, DeviceTensor)


def _inner(each: Any) -> Any:
    if isinstance(each, DeviceTensor):
        return each.backing
    return torch.device("cpu") if isinstance(each, torch.device) else each


def _caller() -> str:
    """The innermost line of Python outside of torch and this file, and ours that led to it."""
    frames = [
        frame
        for frame in traceback.extract_stack()
        if "/torch/" not in frame.filename and frame.filename != __file__
    ]
    ours = [frame for frame in frames if "/vlm_tune/" in frame.filename]
    lines = [frames[-1], *([ours[-1]] if ours and ours[-1] is not frames[-1] else [])]
    return " < ".join(f"{each.filename.rpartition('/')[2]}:{each.lineno}" for each in lines)


_tensor = torch.tensor


def _new_tensor(data: Any, **options: Any) -> torch.Tensor:
    """`torch.tensor`, which reads tensors in a list one by one."""
    if isinstance(data, list):
        data = tree_map_only(torch.Tensor, lambda each: each.item(), data)
    return _tensor(data, **options)


@contextlib.contextmanager
def counted_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[CountedDevice]:
    """The block's tensors may be on the counted device."""
    device = CountedDevice()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: device.pin(tensor))
        patch.setattr(torch.Tensor, "is_pinned", lambda tensor, *_: id(tensor) in device.pinned)
        patch.setattr(torch.cuda, "Stream", _Stream)
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        patch.setattr(torch.cuda, "current_stream", _Stream)
        patch.setattr(torch, "tensor", _new_tensor)
        # With a fake mode below it, torch does not initialise CUDA for a tensor there.
        with FakeTensorMode(), device:
            yield device


def to_counted_device(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Replaces a model's parameters and buffers, and the optimizer's references to them."""
    replaced: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in replaced:
                    moved: Any = DeviceTensor(tensor.detach())
                    if isinstance(tensor, nn.Parameter):
                        moved = nn.Parameter(moved, tensor.requires_grad)
                    replaced[id(tensor)] = moved
                tensors[name] = replaced[id(tensor)]
    for group in optimizer.param_groups:
        group["params"] = [replaced[id(parameter)] for parameter in group["params"]]
