"""Operators called in eager code and through torch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlm_tune.kernels.attention import interval_attention
from vlm_tune.kernels.lora import lora_linear
from vlm_tune.kernels.loss import losses
from vlm_tune.kernels.mlp import lora_gated_mlp
from vlm_tune.kernels.operator import Operator
from vlm_tune.kernels.traceable import packed_linear


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def lora() -> tuple[Any, ...]:
    weight = torch.randn(24, 16)
    return drawn(5, 16), [weight], "", 0, False, None, [drawn(4, 16)], [drawn(24, 4)], [0.5]


def gated() -> tuple[Any, ...]:
    weights = [torch.randn(32, 16), torch.randn(32, 16), torch.randn(16, 32)]
    downs = [drawn(4, 16), drawn(4, 16), drawn(4, 32)]
    ups = [drawn(32, 4), drawn(32, 4), drawn(16, 4)]
    return drawn(5, 16), weights, "", 0, downs, ups, [0.5, 1.0, 2.0], True


def attention() -> tuple[Any, ...]:
    visible_until = torch.full((1, 6), 6, dtype=torch.int32)
    return *(drawn(1, 2, 6, 32) for _ in range(3)), visible_until, 0.2


def head() -> tuple[Any, ...]:
    return drawn(5, 16), torch.randn(9, 16), torch.arange(5), True


def packed() -> tuple[Any, ...]:
    codes, state = quantize_4bit(torch.randn(24, 64), blocksize=64, quant_type="nf4")
    return drawn(5, 64), [codes, state.absmax], "nf4:64", [24], torch.randn(24)


CALLS = {
    packed_linear: packed,
    lora_linear: lora,
    lora_gated_mlp: gated,
    interval_attention: attention,
    losses: head,
}


def leaves(arguments: tuple[Any, ...]) -> list[Tensor]:
    flat = [each for some in arguments for each in (some if isinstance(some, list) else [some])]
    return [each for each in flat if isinstance(each, Tensor) and each.requires_grad]


def first_of(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def passes(call: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor]:
    """The first output of a call, and the gradients of its arguments."""
    out = first_of(call(*arguments))
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), leaves(arguments))]


class Dispatched(TorchDispatchMode):
    """The names of the operators that a dispatcher is called for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.namespace)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("operator", "draw"), CALLS.items(), ids=lambda each: each.__name__)
def test_eager_code_computes_what_the_dispatcher_does(
    operator: Operator, draw: Callable[[], tuple[Any, ...]]
) -> None:
    arguments = draw()
    assert leaves(arguments)
    with Dispatched() as eager:
        direct = passes(operator, arguments)
    with Dispatched() as traced:
        through = passes(operator.traced, arguments)
    assert all(map(torch.equal, direct, through))
    assert "vlm_tune" in traced.names
    assert "vlm_tune" not in eager.names


@pytest.mark.parametrize(("operator", "draw"), CALLS.items(), ids=lambda each: each.__name__)
def test_without_a_gradient_the_function_runs_alone(
    operator: Operator, draw: Callable[[], tuple[Any, ...]]
) -> None:
    arguments = draw()
    with torch.no_grad():
        out = first_of(operator(*arguments))
        assert torch.equal(out, first_of(operator.traced(*arguments)))
        assert not out.requires_grad


def test_tensors_without_numbers_are_left_to_the_dispatcher() -> None:
    rows, *rest = lora()
    tensors = [[each.to("meta") for each in some] for some in (rest[0], rest[5], rest[6])]
    out, low = lora_linear(rows.to("meta"), tensors[0], *rest[1:5], *tensors[1:], rest[7])
    assert out.is_meta
    assert (out.shape, low.shape) == ((5, 24), (5, 4))


def test_a_second_gradient_is_refused() -> None:
    arguments = lora()
    out = lora_linear(*arguments)[0]
    (first,) = torch.autograd.grad(out.square().sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
