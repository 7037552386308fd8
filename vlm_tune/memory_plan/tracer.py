"""Traces the memory of a training step without allocating it, by the real passes on fake tensors.

Storages are tracked: when one is created, how large it is, and when the last tensor on it is gone.
So saved inputs, masks, autocast's copies and recomputation count as they are, for any model and any
attention.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

DEEP = 6
"""Stacks of more layers than this are traced with a few layers only."""

LARGE = 4096
"""Elements from which on a float tensor is made fake, since its values are not needed."""

KINDS = ("activations", "logits", "gradients")


@dataclass
class Trace:
    """Every storage of a step: creations (+ its number) and releases (- its number) in order.

    `sizes` and `kinds` are by number. `backward` is the index of the event with which the backward
    pass starts, `below` of the one with which it leaves the language model.
    """

    events: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=lambda: [0])
    kinds: list[str] = field(default_factory=lambda: ["activations"])
    backward: int = 0
    below: int | None = None

    def peaks(self, *, accumulating: bool) -> list[np.ndarray]:
        """Bytes of each of `KINDS` at the peaks of four parts of the step.

        The parts are the forward pass, two halves of the language model's backward pass, and the
        backward pass below it: each peak grows linearly with the number of layers. `accumulating`
        means a micro-batch that starts with the gradients of earlier ones.
        """
        accumulated = (
            sum(
                size
                for size, kind in zip(self.sizes, self.kinds, strict=True)
                if kind == "gradients"
            )
            if accumulating
            else 0
        )
        below = len(self.events) if self.below is None else self.below
        middle = (self.backward + below) // 2
        live = np.array([0, 0, accumulated])
        fresh = 0
        best = [live.copy() for _ in range(4)]
        for place, event in enumerate(self.events):
            size = self.sizes[abs(event)]
            kind = KINDS.index(self.kinds[abs(event)])
            if accumulating and kind == 2:
                # A gradient is added to the existing one as soon as it is complete.
                fresh = size if event > 0 else fresh
            else:
                live[kind] += size if event > 0 else -size
            part = (place >= self.backward) + (place >= middle) + (place >= below)
            if live.sum() + fresh > best[part].sum():
                best[part] = live + np.array([0, 0, fresh])
        return best


class _Recorder(TorchDispatchMode):
    """Runs float operations on fake tensors and integer ones on real tensors.

    So masks select the same positions as in training.
    """

    def __init__(self, fake: FakeTensorMode, vocabulary: int) -> None:
        super().__init__()
        self.fake = fake
        self.vocabulary = vocabulary
        self.trace = Trace()
        self.alive: dict[int, tuple[int, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Two thirds of all calls, in which nothing is computed.
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        kwargs = kwargs or {}
        if any(issubclass(kind, FakeTensor) for kind in types):
            if func is torch.ops.aten.index.Tensor:
                args = (args[0], _positions(args[1]))
            with self.fake:
                output = func(*args, **kwargs)
        else:
            output = tree_map_only(torch.Tensor, self._emptied, func(*args, **kwargs))
        if isinstance(output, torch.Tensor):  # nearly always so, and many times faster
            return self._note(output)
        tree_map_only(torch.Tensor, self._note, output)
        return output

    def _emptied(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replaces a large float tensor (an additive mask) by a fake one.

        Nothing is selected by its values.
        """
        if not tensor.is_floating_point() or tensor.numel() < LARGE:
            return tensor
        with self.fake:
            return torch.empty_like(tensor, device="cpu")

    def know(self, tensor: torch.Tensor) -> None:
        """Registers a tensor that exists before the step and is not counted in it."""
        storage = tensor.untyped_storage()
        self.alive[id(storage)] = (0, storage)

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in self.alive:
            number = len(self.trace.sizes)
            self.trace.sizes.append(storage.nbytes())
            wide = (
                tensor.ndim > 1
                and tensor.shape[-1] == self.vocabulary
                and tensor.is_floating_point()
            )
            self.trace.kinds.append("logits" if wide else "activations")
            self.trace.events.append(number)
            self.alive[id(storage)] = (
                number,
                weakref.ref(storage, self._gone(id(storage), number)),
            )
        return tensor

    def _gone(self, key: int, number: int) -> Callable[[Any], None]:
        def gone(_: Any) -> None:
            self.trace.events.append(-number)
            self.alive.pop(key, None)

        return gone

    def mark(self, tensor: torch.Tensor | None, kind: str) -> None:
        """Sets the kind of a tensor of the step."""
        if tensor is not None and (entry := self.alive.get(id(tensor.untyped_storage()))):
            self.trace.kinds[entry[0]] = kind


def _positions(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Replaces real boolean masks in an index by positions.

    The number of positions determines the output's shape.
    """
    positions: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            positions += list(index.nonzero(as_tuple=True))
        else:
            positions.append(index)
    return positions


def to_fake(model: nn.Module, fake: FakeTensorMode) -> None:
    """Replaces a meta model's parameters and buffers by fake CPU tensors.

    Shared tensors stay shared, and tensors that are fake already stay.
    """
    replaced: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or isinstance(tensor, FakeTensor):
                    continue
                if id(tensor) not in replaced:
                    with fake:
                        empty: Any = torch.empty_strided(
                            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
                        )
                    put = (
                        nn.Parameter(empty, tensor.requires_grad)
                        if isinstance(tensor, nn.Parameter)
                        else empty
                    )
                    vars(put).update(vars(tensor))  # with the unpacked shape of packed weights
                    replaced[id(tensor)] = (put, tensor)
                tensors[name] = replaced[id(tensor)][0]


def stacks(module: nn.Module) -> list[nn.ModuleList]:
    """The outermost lists of more than `DEEP` layers that are alike.

    The first layer may differ: T5's has the position bias.
    """
    lists: list[nn.ModuleList] = []
    for child in module.children():
        alike = (
            isinstance(child, nn.ModuleList)
            and len(child) > DEEP
            and len({_likeness(layer) for layer in child[1:]}) == 1
        )
        lists += [child] if alike else stacks(child)  # type: ignore[list-item]
    return lists


def _likeness(layer: nn.Module) -> tuple[Any, ...]:
    """The properties of a layer that its memory depends on.

    They are its weights, which of them train, and its number of forward pre-hooks.
    """
    return len(layer._forward_pre_hooks), *(
        (tuple(p.shape), p.dtype, p.requires_grad) for p in layer.parameters()
    )


def by_depth(model: nn.Module, measure: Callable[[], np.ndarray]) -> np.ndarray:
    """`measure()` of a model, extrapolated from 2 and 3 layers if it has many that are alike.

    Each figure must grow by the same amount with each layer. A model with stacks of different
    depths, or without deep stacks, is measured whole.
    """
    deep_stacks = stacks(model)
    depths = {len(stack) for stack in deep_stacks}
    if len(depths) != 1:
        return measure()
    (depth,) = depths
    whole = [dict(stack._modules) for stack in deep_stacks]
    measured = []
    try:
        for few in (2, 3):
            for stack, layers in zip(deep_stacks, whole, strict=True):
                stack._modules = dict(list(layers.items())[:few])
            measured.append(measure())
    finally:
        for stack, layers in zip(deep_stacks, whole, strict=True):
            stack._modules = layers
    return measured[1] + (depth - 3) * (measured[1] - measured[0])


def trace_step(
    model: nn.Module,
    llm: nn.Module,
    step: Callable[[], torch.Tensor],
    vocabulary: int,
    fake: FakeTensorMode,
) -> Trace:
    """Traces the allocations of `step`, which returns a loss of the fake `model`, and its backward.

    The first argument of `llm` is the embeds [B, L, E].
    """
    recorder = _Recorder(fake, vocabulary)

    def leave(_: Any) -> None:
        recorder.trace.below = len(recorder.trace.events)

    def enter(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs[0].requires_grad:
            inputs[0].register_hook(leave)

    entered = llm.register_forward_pre_hook(enter)
    for tensor in [*model.parameters(), *model.buffers()]:
        recorder.know(tensor)
    try:
        with recorder:
            loss = step()
            recorder.trace.backward = len(recorder.trace.events)
            loss.backward()
            del loss
    finally:
        entered.remove()
    for parameter in model.parameters():
        recorder.mark(parameter.grad, "gradients")
    return recorder.trace
