"""LoRA on 4-bit weights in tensor code, as on a GPU, by bitsandbytes' own CPU backend."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from vlm_tune.kernels import devices, traceable
from vlm_tune.model.acceleration.lora_layers import LoraLinear, merge_projections

WIDTH = 64
OUTPUTS = (64, 32, 128)


class Packed(nn.Module):
    """Three layers in 4 bits that read the same input."""

    def __init__(self, *, bias: bool, nested: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (
            Linear4bit(
                WIDTH,
                outputs,
                bias=bias,
                compute_dtype=torch.float32,
                compress_statistics=nested,
                quant_type="nf4",
            )
            for outputs in OUTPUTS
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x).sin(), self.v(x)], -1)


def packed(*, bias: bool, nested: bool, custom: bool) -> Any:
    torch.manual_seed(1)
    model = Packed(bias=bias, nested=nested).to("cpu")
    for layer in (model.q, model.k, model.v):
        # Else the first pass in eval mode would repack the weight for a kernel without a gradient.
        layer.support_avx512bf16_for_cpu = False
        assert layer.weight.quant_state.nested == nested  # type: ignore[union-attr]
    config = LoraConfig(
        target_modules=["q", "k", "v"], init_lora_weights=False, r=4, rank_pattern={"k": 2}
    )
    if custom:
        config._register_custom_module({Linear4bit: LoraLinear})
    LoraModel(model, {"default": config}, "default")
    return model


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of x and of what trains, for a sum of squares."""
    model.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    output.square().sum().backward()
    assert leaf.grad is not None
    return {
        "output": output.detach(),
        "x": leaf.grad,
        **{name: p.grad for name, p in model.named_parameters() if p.grad is not None},
    }


def assert_near(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float((actual[name] - value).norm() / value.norm()) <= 1e-5, name


@pytest.fixture(params=[(False, False), (True, True)], ids=["plain", "nested-bias"])
def models(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """PEFT's layers, and ours with projections merged as on a GPU."""
    nested, bias = request.param
    monkeypatch.setattr(devices, "by_operator", lambda device: False)
    peft, ours = (packed(bias=bias, nested=nested, custom=custom) for custom in (False, True))
    assert merge_projections(ours) == 1
    return peft, ours


def test_outputs_and_gradients_are_pefts(models: tuple[Any, Any]) -> None:
    peft, ours = models
    x = torch.randn(2, 5, WIDTH)
    assert_near(gradients(ours, x), gradients(peft, x))
    with torch.no_grad():
        assert torch.equal(ours(x), peft(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_no_dequantised_weight_is_saved_and_one_exists_at_a_time(
    compiled: bool, models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled, what is saved is decided by the partition of the joint graph."""
    peft, ours = models
    x = torch.randn(50, WIDTH)
    wanted = gradients(peft, x)
    alive: list[weakref.ref[Tensor]] = []
    unpacked = traceable.unpacked

    def watched(*arguments: Any) -> Tensor:
        assert all(each() is None for each in alive)
        weight = unpacked(*arguments)
        alive.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(traceable, "unpacked", watched)
    saved: list[Tensor] = []
    model = ours
    if compiled:
        torch._dynamo.reset()
        model = torch.compile(ours, backend="aot_eager_decomp_partition", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        actual = gradients(model, x)
    assert_near({name.removeprefix("_orig_mod."): each for name, each in actual.items()}, wanted)
    assert len(alive) == 6
    weights = {(outputs, WIDTH) for outputs in (*OUTPUTS, sum(OUTPUTS))}
    shapes = {tuple(each.shape) for each in saved if each.is_floating_point()}
    assert saved and not shapes & (weights | {shape[::-1] for shape in weights})
