"""A training step that allocates nothing: the real forward and backward pass on fake tensors, with what each would hold.

What is followed are storages: when one comes to be, how large it is, and when the last tensor on it is gone. So saved
inputs, masks, copies by autocast and recomputation count as they are, for any model and any attention.
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
"""Layers from which on only some are traced."""

LARGE = 4096
"""Numbers of a float tensor that are not kept for their values."""

KINDS = ("activations", "logits", "gradients")


@dataclass
class Trace:
    """Every storage of a step in order of birth (+ its number) and death (- its number), with sizes and kinds by number.

    `backward` is the event the backward pass starts with, `below` the one with which it leaves the language model.
    """

    events: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=lambda: [0])
    kinds: list[str] = field(default_factory=lambda: ["activations"])
    backward: int = 0
    below: int | None = None

    def peaks(self, *, accumulating: bool) -> list[np.ndarray]:
        """Bytes of each of KINDS at the fullest moment of each of four parts of the step.

        They are the forward pass, two halves of the language model's backward pass, and what is below it: each grows evenly
        with the number of layers. `accumulating` is a micro-batch that finds the gradients of those before.
        """
        kept = (
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
        live = np.array([0, 0, kept])
        fresh = 0
        best = [live.copy() for _ in range(4)]
        for place, event in enumerate(self.events):
            size = self.sizes[abs(event)]
            kind = KINDS.index(self.kinds[abs(event)])
            if accumulating and kind == 2:
                # A gradient is added to the one that is there as soon as it is complete.
                fresh = size if event > 0 else fresh
            else:
                live[kind] += size if event > 0 else -size
            part = (place >= self.backward) + (place >= middle) + (place >= below)
            if live.sum() + fresh > best[part].sum():
                best[part] = live + np.array([0, 0, fresh])
        return best


class _Recorder(TorchDispatchMode):
    """Runs float work on fake tensors and integer work on real ones, so that masks still select what they select."""

    def __init__(self, fake: FakeTensorMode, vocabulary: int) -> None:
        super().__init__()
        self.fake = fake
        self.vocabulary = vocabulary
        self.trace = Trace()
        self.alive: dict[int, tuple[int, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func is torch.ops.prim.device.default
        ):  # two in three of all calls, and nothing is computed
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        kwargs = kwargs or {}
        if any(issubclass(kind, FakeTensor) for kind in types):
            if func is torch.ops.aten.index.Tensor:
                args = (args[0], _positions(args[1]))
            with self.fake:
                found = func(*args, **kwargs)
        else:
            found = tree_map_only(torch.Tensor, self._emptied, func(*args, **kwargs))
        if isinstance(found, torch.Tensor):  # nearly always, and many times faster
            return self._note(found)
        tree_map_only(torch.Tensor, self._note, found)
        return found

    def _emptied(self, tensor: torch.Tensor) -> torch.Tensor:
        """A large float tensor (a mask to add) as a fake one: nothing is selected by its values."""
        if not tensor.is_floating_point() or tensor.numel() < LARGE:
            return tensor
        with self.fake:
            return torch.empty_like(tensor, device="cpu")

    def know(self, tensor: torch.Tensor) -> None:
        """A tensor that is there before the step and not counted in it."""
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
        """Says what a tensor of the step is for."""
        if tensor is not None and (found := self.alive.get(id(tensor.untyped_storage()))):
            self.trace.kinds[found[0]] = kind


def _positions(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Real boolean masks among an index's tensors as positions: their number is what the result's shape depends on."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            found += list(index.nonzero(as_tuple=True))
        else:
            found.append(index)
    return found


def to_fake(model: nn.Module, fake: FakeTensorMode) -> None:
    """Puts fake CPU tensors in the place of a meta model's parameters and buffers; those that are shared stay so, fake ones too."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or isinstance(tensor, FakeTensor):
                    continue
                if id(tensor) not in made:
                    with fake:
                        empty: Any = torch.empty_strided(
                            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
                        )
                    put = (
                        nn.Parameter(empty, tensor.requires_grad)
                        if isinstance(tensor, nn.Parameter)
                        else empty
                    )
                    vars(put).update(vars(tensor))  # the shape that packed weights stand for
                    made[id(tensor)] = (put, tensor)
                held[name] = made[id(tensor)][0]


def stacks(module: nn.Module) -> list[nn.ModuleList]:
    """The outermost lists of more than DEEP layers that are alike, the first aside (of T5's, it has the position bias)."""
    found: list[nn.ModuleList] = []
    for child in module.children():
        alike = (
            isinstance(child, nn.ModuleList)
            and len(child) > DEEP
            and len({_likeness(layer) for layer in child[1:]}) == 1
        )
        found += [child] if alike else stacks(child)  # type: ignore[list-item]
    return found


def _likeness(layer: nn.Module) -> tuple[Any, ...]:
    """What a layer's memory depends on: its weights, what of them trains, and whether something is hooked in before it."""
    return len(layer._forward_pre_hooks), *(
        (tuple(p.shape), p.dtype, p.requires_grad) for p in layer.parameters()
    )


def by_depth(model: nn.Module, measure: Callable[[], np.ndarray]) -> np.ndarray:
    """`measure()` of a model, from what it is with 2 and with 3 of its layers where these are many and alike.

    Each figure must grow by the same with each layer. With several stacks of different depths the model is measured whole.
    """
    found = stacks(model)
    depths = {len(stack) for stack in found}
    if len(depths) != 1:
        return measure()
    (depth,) = depths
    whole = [dict(stack._modules) for stack in found]
    measured = []
    try:
        for few in (2, 3):
            for stack, layers in zip(found, whole, strict=True):
                stack._modules = dict(list(layers.items())[:few])
            measured.append(measure())
    finally:
        for stack, layers in zip(found, whole, strict=True):
            stack._modules = layers
    return measured[1] + (depth - 3) * (measured[1] - measured[0])


def trace_step(
    model: nn.Module,
    llm: nn.Module,
    step: Callable[[], torch.Tensor],
    vocabulary: int,
    fake: FakeTensorMode,
) -> Trace:
    """What `step`, which gives a loss of the fake `model`, and its backward pass allocate; `llm` takes embeds [B, L, E] first."""
    recorder = _Recorder(fake, vocabulary)

    def leave(_: Any) -> None:
        recorder.trace.below = len(recorder.trace.events)

    def enter(_: nn.Module, given: tuple[Any, ...]) -> None:
        if given[0].requires_grad:
            given[0].register_hook(leave)

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
