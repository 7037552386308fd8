"""The kernel behind LoRA layers on a CPU with AMX.

bf16 outputs and gradients as near to exact ones as torch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny_models import built, parsed, tuned_by, wake_adapters, with_tune
from vlm_tune.kernels.cpu import native
from vlm_tune.kernels.lora import TOGETHER, by_kernel, lora_linear
from vlm_tune.model.acceleration.lora_layers import LoraLinear, merge_projections

needs_kernel = pytest.mark.usefixtures("kernels")


@dataclass
class Layers:
    """Layers that read the same rows, with what they are given.

    `outputs` and `ranks` are of each.
    """

    count: int
    inputs: int
    outputs: tuple[int, ...]
    ranks: tuple[int, ...]
    bias: bool = False
    scales: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(self.count + self.inputs)
        half = lambda *shape: torch.randn(*shape).bfloat16()  # noqa: E731
        self.scales = [0.5 + 0.25 * place for place in range(len(self.outputs))]
        self.x, self.gradient = half(self.count, self.inputs), half(self.count, sum(self.outputs))
        self.weight = half(sum(self.outputs), self.inputs)
        self.added = half(sum(self.outputs)) if self.bias else None
        self.downs = [torch.randn(rank, self.inputs) for rank in self.ranks]
        self.ups = [
            torch.randn(size, rank) / 4 for size, rank in zip(self.outputs, self.ranks, strict=True)
        ]

    def run(
        self, *, quick: bool, x: torch.Tensor | None = None, gradient: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Output, and gradients of x, every A and every B, of the operator."""
        leaf = self.x.clone().requires_grad_() if x is None else x.requires_grad_()
        downs, ups = (
            [each.clone().requires_grad_() for each in tensors]
            for tensors in (self.downs, self.ups)
        )
        weight, room = self.weight, 0
        if len(downs) > 1:
            room = -(-sum(self.ranks) // 8) * 8
            weight = torch.cat([weight, weight.new_zeros(len(weight), room)], 1)
        out, _ = lora_linear(leaf, [weight], "", room, quick, self.added, downs, ups, self.scales)
        out.backward(self.gradient if gradient is None else gradient)
        return [
            out.detach(),
            *(each.grad for each in (leaf, *downs, *ups) if each.grad is not None),
        ]

    def exact(self) -> list[torch.Tensor]:
        """The same in fp64, of the numbers as bf16 holds them."""
        x = self.x.double().requires_grad_()
        downs = [each.bfloat16().double().requires_grad_() for each in self.downs]
        ups = [each.double().requires_grad_() for each in self.ups]
        out = x @ self.weight.double().t() + (0 if self.added is None else self.added.double())
        parts = [
            scale * (x @ down.t()) @ up.t()
            for down, up, scale in zip(downs, ups, self.scales, strict=True)
        ]
        out = out + torch.cat(parts, 1)
        out.backward(self.gradient.double())
        return [out.detach(), *(each.grad for each in (x, *downs, *ups) if each.grad is not None)]


SHAPES: dict[str, Callable[[], Layers]] = {
    "whole tiles": lambda: Layers(64, 64, (96,), (16,)),
    "one row": lambda: Layers(1, 40, (24,), (3,)),
    "rows, inputs, outputs and ranks that fill no tile": lambda: Layers(
        77, 100, (70,), (17,), bias=True
    ),
    "many ranks": lambda: Layers(65, 200, (96,), (72,)),
    "deep": lambda: Layers(90, 1700, (40,), (8,)),
    "wider than the packed columns": lambda: Layers(40, 1200, (900,), (8,), bias=True),
    "three layers": lambda: Layers(130, 96, (64, 32, 32), (8, 4, 16)),
    "two layers that go back one by one": lambda: Layers(
        70, 64, (TOGETHER - 100, 300), (16, 8), bias=True
    ),
}


@needs_kernel
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_it_errs_no_more_than_torch_s_products(name: str, threads: int) -> None:
    layers, before = SHAPES[name](), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        mine, torchs, exact = layers.run(quick=True), layers.run(quick=False), layers.exact()
    finally:
        torch.set_num_threads(before)
    assert len(mine) == len(torchs) == len(exact) == 2 + 2 * len(layers.outputs)
    for ours, other, wanted in zip(mine, torchs, exact, strict=True):
        error, allowed = ((each.double() - wanted).norm() / wanted.norm() for each in (ours, other))
        assert error <= max(1.1 * float(allowed), 1e-3)


@needs_kernel
def test_rows_and_gradients_may_lie_in_larger_tensors() -> None:
    layers = Layers(50, 64, (48,), (8,))
    wide, flowing = torch.zeros(50, 80).bfloat16(), torch.zeros(50, 64).bfloat16()
    wide[:, :64], flowing[:, :48] = layers.x, layers.gradient
    outputs = layers.run(quick=True, x=wide[:, :64].detach(), gradient=flowing[:, :48])
    for one, other in zip(outputs, layers.run(quick=True), strict=True):
        assert torch.equal(one, other)


@needs_kernel
def test_a_weight_that_is_strided_and_an_input_that_needs_no_gradient() -> None:
    """A batch's first layer: nothing flows on, and A and B have theirs."""
    layers = Layers(45, 64, (48,), (8,))
    wanted = layers.run(quick=True)
    downs, ups = layers.downs[0].clone().requires_grad_(), layers.ups[0].clone().requires_grad_()
    weight = torch.zeros(48, 96).bfloat16()
    weight[:, :64] = layers.weight
    out, saved = lora_linear(
        layers.x, [weight[:, :64]], "", 0, True, None, [downs], [ups], layers.scales
    )
    out.backward(layers.gradient)
    assert saved.shape == (45, 8)
    for ours, other in zip((out, downs.grad, ups.grad), (wanted[0], *wanted[2:]), strict=True):
        assert ours is not None and torch.equal(ours, other)


@needs_kernel
def test_what_the_kernel_takes() -> None:
    rows = torch.zeros(4, 64)
    assert by_kernel(rows.bfloat16(), [64]) and not by_kernel(rows, [64])
    assert not by_kernel(rows.bfloat16(), [64, 5000]) and not by_kernel(
        torch.zeros(4, 5000).bfloat16(), [64]
    )


@needs_kernel
def test_a_training_step_goes_through_it(
    tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parsed(with_tune(tiny_recipe("causal", precision="bf16")))
    model = built(recipe)
    tuned_by(model, recipe)
    wake_adapters(model)
    assert merge_projections(model) > 0
    calls: list[str] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(native.library(native.KERNELS), name)

    monkeypatch.setattr(native, "kernels", Watched)
    layer = next(module for module in model.llm.modules() if isinstance(module, LoraLinear))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(
            torch.randn(3, 5, layer.base_layer.in_features, requires_grad=True)
        ).float().sum().backward()
    assert calls == ["low_rank", "low_rank_backward"]
    assert layer.lora_B[layer.name].weight.grad is not None
