"""Operators that a compiler sees as one node, and that eager code calls as plain functions.

torch's dispatcher takes some 70 µs a pass to reach an operator written in Python, as long as a
small layer computes. Where nothing traces the call, its function runs at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlm_tune.kernels.version import VERSION

Layout = tuple[int | None, ...]
"""The length of each argument that is a list; None for the others."""


class Operator:
    """A function of tensors, registered as `vlm_tune::NAME_VERSION` for `torch.compile`.

    The first argument of a call is a tensor, and all are positional. An operator whose gradient is
    not registered is not differentiable.

    Args:
        name: The name without its version.
        compute: Computes the outputs. Its annotations are the operator's schema, and it changes
            none of its arguments.
    """

    def __init__(self, name: str, compute: Callable[..., Any]) -> None:
        self.__name__ = name
        self.compute = compute
        self.defaults = compute.__defaults__ or ()
        self.count = compute.__code__.co_argcount
        self.traced = torch.library.custom_op(
            f"vlm_tune::{name}_{VERSION}", compute, mutates_args=()
        )
        self.save: Callable[..., None] | None = None
        self.backward: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        """The outputs of a call."""
        if torch.compiler.is_compiling() or not _has_numbers(arguments[0]):
            return self.traced(*arguments)
        if self.backward is None or not torch.is_grad_enabled():
            return self.compute(*arguments)
        missing = self.count - len(arguments)
        arguments += self.defaults[len(self.defaults) - missing :]
        layout = tuple(len(each) if isinstance(each, (list, tuple)) else None for each in arguments)
        return _Called.apply(*_flat(arguments, layout), self, layout)

    def register_fake(self, shapes: Callable[..., Any]) -> Callable[..., Any]:
        """Registers what makes empty outputs, of the right shapes, for a trace."""
        return self.traced.register_fake(shapes)

    def register_gradient(
        self, backward: Callable[..., Any], save: Callable[[Any, tuple[Any, ...], Any], None]
    ) -> None:
        """Registers the gradient, as `torch.library.CustomOpDef.register_autograd` does.

        Args:
            backward: Returns a gradient for each argument, a list for a list of tensors.
            save: Saves on the context what `backward` needs of arguments and outputs. Of
                `ctx.needs_input_grad` both may read the first argument's.
        """
        self.backward = backward
        self.save = save
        self.traced.register_autograd(backward, setup_context=save)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Makes an `Operator` of the decorated function."""
    return lambda compute: Operator(name, compute)


def _has_numbers(tensor: Tensor) -> bool:
    """Whether a tensor is a plain one. Others have shapes alone, or watch what is done to them."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta


class _Called(torch.autograd.Function):
    """A call of an operator's function: its arguments, flat, then the operator and the layout."""

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> Any:
        *tensors, called, layout = flat
        arguments = _joined(tensors, layout)
        outputs = called.compute(*arguments)
        called.save(ctx, arguments, outputs)
        ctx.called = called
        ctx.layout = layout
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *flows: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        gradients = ctx.called.backward(ctx, *flows)
        if not isinstance(gradients, tuple):
            gradients = (gradients,)
        return *_flat(gradients, ctx.layout), None, None


def _flat(arguments: Sequence[Any], layout: Layout) -> list[Any]:
    """The arguments, with the elements of lists in their place. None stands for a list of None."""
    flat: list[Any] = []
    for each, length in zip(arguments, layout, strict=True):
        if length is None:
            flat.append(each)
        else:
            flat.extend([None] * length if each is None else each)
    return flat


def _joined(flat: Sequence[Any], layout: Layout) -> tuple[Any, ...]:
    """The arguments that `_flat` opened up."""
    elements = iter(flat)
    return tuple(
        next(elements) if length is None else [next(elements) for _ in range(length)]
        for length in layout
    )
