"""The kernel of gated feed-forward parts against the formula in double precision.

Also modules that run by it against transformers' own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    OPTConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from vlm_tune.kernels import mlp as mlp_operator
from vlm_tune.kernels.cpu import native
from vlm_tune.kernels.mlp import lora_gated_mlp, lora_gated_mlp_backward
from vlm_tune.kernels.reference_mlp import ACTIVATIONS
from vlm_tune.model.acceleration import gated_modules
from vlm_tune.model.acceleration.gated_modules import GatedModule
from vlm_tune.model.acceleration.install import MLP, AccelerationReport, replace_mlps
from vlm_tune.model.acceleration.lora_layers import LoraLinear, merge_projections

pytestmark = pytest.mark.usefixtures("either_path")

BF16 = 2**-8


def relative(actual: Tensor, wanted: Tensor) -> float:
    return float((actual.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


def given(
    rows: int, width: int, inner: int, ranks: tuple[int, int, int]
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """x, the weights of gate, up and down, and A and B of each."""
    torch.manual_seed(rows + width)
    sizes = [(width, inner), (width, inner), (inner, width)]
    weights = [(torch.randn(outputs, inputs) / inputs**0.5).bfloat16() for inputs, outputs in sizes]
    downs = [
        torch.randn(rank, inputs) / inputs**0.5
        for rank, (inputs, _) in zip(ranks, sizes, strict=True)
    ]
    ups = [
        torch.randn(outputs, rank) * 0.3 for rank, (_, outputs) in zip(ranks, sizes, strict=True)
    ]
    return torch.randn(rows, width).bfloat16(), weights, downs, ups


SCALES = [2.0, 1.5, 0.5]


def formula(
    x: Tensor, weights: list[Tensor], downs: list[Tensor], ups: list[Tensor], activation: int
) -> Tensor:
    def layer(place: int, x: Tensor) -> Tensor:
        return (
            x @ weights[place].double().t()
            + SCALES[place] * (x @ downs[place].t()) @ ups[place].t()
        )

    return layer(2, ACTIVATIONS[activation](layer(0, x)) * layer(1, x))


@pytest.mark.parametrize(
    ("rows", "width", "inner", "ranks", "activation"),
    [
        (300, 576, 1536, (16, 16, 16), 0),
        (33, 64, 96, (4, 4, 4), 1),
        (700, 128, 320, (8, 16, 24), 0),
        (200, 768, 2048, (40, 8, 33), 1),
        (70, 64, 64, (0, 0, 0), 0),
        (70, 64, 96, (0, 8, 0), 1),
    ],
)
def test_outputs_and_gradients_are_those_of_the_formula(
    rows: int, width: int, inner: int, ranks: tuple[int, int, int], activation: int
) -> None:
    x, weights, downs, ups = given(rows, width, inner, ranks)
    flow = torch.randn(rows, width).bfloat16()
    exact = x.double().requires_grad_()
    leaves = [[each.double().requires_grad_() for each in group] for group in (downs, ups)]
    wanted = formula(exact, weights, *leaves, activation)
    wanted.backward(flow.double())
    output, *saved = lora_gated_mlp(x, weights, "", activation, downs, ups, SCALES, True)
    assert (
        torch.equal(
            output, lora_gated_mlp(x, weights, "", activation, downs, ups, SCALES, False)[0]
        )
        or rows < 2 * mlp_operator.FEW
    )
    assert relative(output, wanted) < 2 * BF16
    of_x, of_downs, of_ups = lora_gated_mlp_backward(
        flow, x, saved, weights, "", activation, downs, ups, SCALES, True
    )
    assert exact.grad is not None and relative(of_x, exact.grad) < 2 * BF16
    for flat, group in ((of_downs, leaves[0]), (of_ups, leaves[1])):
        parts = flat.split([each.numel() for each in group])
        for part, each in zip(parts, group, strict=True):
            if each.numel():
                assert each.grad is not None and relative(part, each.grad.flatten()) < 3 * BF16
    none, *same = lora_gated_mlp_backward(
        flow, x, saved, weights, "", activation, downs, ups, SCALES, False
    )
    assert (
        none.shape == (0, width) and torch.equal(same[0], of_downs) and torch.equal(same[1], of_ups)
    )


def test_a_row_is_computed_alike_wherever_it_stands() -> None:
    x, weights, downs, ups = given(500, 64, 96, (4, 4, 4))
    whole = lora_gated_mlp(x, weights, "", 0, downs, ups, SCALES, True)[0]
    assert torch.equal(
        lora_gated_mlp(x[131:402], weights, "", 0, downs, ups, SCALES, True)[0], whole[131:402]
    )


@pytest.mark.parametrize("activation", [0, 1])
def test_far_numbers_neither_overflow_nor_vanish(activation: int) -> None:
    """Gates of up to 3e4 either way: what is open passes on, what is shut is nothing."""
    width = inner = 32
    x = torch.zeros(64, width)
    x[:, 0] = torch.linspace(-3e4, 3e4, 64)
    x[:, 1] = 1
    weights = [torch.zeros(inner, width), torch.zeros(inner, width), torch.eye(width)]
    weights[0][:, 0], weights[1][:, 1] = 1, 1
    empty = [torch.empty(0, 32)] * 3, [torch.empty(32, 0)] * 3
    output = lora_gated_mlp(
        x.bfloat16(), [each.bfloat16() for each in weights], "", activation, *empty, SCALES, True
    )[0]
    wanted = (silu, lambda g: gelu(g, approximate="tanh"))[activation](
        x[:, :1].bfloat16().float()
    ).expand(-1, 32)
    torch.testing.assert_close(output.float(), wanted, rtol=2 * BF16, atol=1e-30)


def decoder(config: Any, **changed: Any) -> nn.Module:
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 64,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    return (
        AutoModelForCausalLM.from_config(config(**sizes | changed))
        .bfloat16()
        .requires_grad_(False)
        .eval()
    )


def test_modules_are_known_by_what_they_compute() -> None:
    """No random number is drawn, and a module is taken but once."""
    llama = decoder(LlamaConfig, intermediate_size=96)
    torch.manual_seed(3)
    assert gate(llama) == 2 and gate(llama) == 2
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert gate(decoder(GemmaConfig, intermediate_size=96, num_key_value_heads=1, head_dim=32)) == 2
    assert gate(decoder(LlamaConfig, intermediate_size=96, hidden_act="relu")) == 0
    assert gate(decoder(OPTConfig, ffn_dim=96, word_embed_proj_dim=64)) == 0
    small = {
        "d_model": 64,
        "d_ff": 96,
        "d_kv": 32,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": 64,
    }
    assert gate(T5ForConditionalGeneration(T5Config(**small, feed_forward_proj="gated-gelu"))) == 2
    assert gate(T5ForConditionalGeneration(T5Config(**small))) == 0


def gate(model: nn.Module) -> int:
    """The number of MLPs that were replaced."""
    report = AccelerationReport()
    replace_mlps(model, report)
    return report.replaced[MLP]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which passes of the operator were asked for."""
    calls: list[str] = []

    def counting(module: Any, name: str) -> Callable[..., Any]:
        real = getattr(module, name)
        return lambda *given: (calls.append(name), real(*given))[1]

    for module, name in (
        (gated_modules, "lora_gated_mlp"),
        (mlp_operator, "lora_gated_mlp_backward"),
    ):
        monkeypatch.setattr(module, name, counting(module, name))
    return calls


def mlp(change: Callable[[Any], None] = lambda module: None, rank: int = 4) -> tuple[Any, Any]:
    """A Llama's feed-forward module with LoRA by the operator, and the same with PEFT's layers."""
    plain = decoder(LlamaConfig, intermediate_size=96)
    if rank:
        adapted: Any = inject_adapter_in_model(
            LoraConfig(r=rank, lora_alpha=8, target_modules=["gate_proj", "up_proj", "down_proj"]),
            plain,
        )
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter, dtype=torch.float32) * 0.1
    fast = copy.deepcopy(plain)
    for module in fast.modules():
        if type(module).__name__ == "Linear" and hasattr(module, "lora_A"):
            module.__class__ = LoraLinear
    gate(fast)
    merge_projections(fast)
    both = tuple(model.get_submodule("model.layers.0.mlp") for model in (fast, plain))
    for module in both:
        change(module)
    return both[0], both[1]


@pytest.mark.parametrize("rank", [0, 4])
def test_a_module_gives_what_transformers_and_peft_give(rank: int, counted: list[str]) -> None:
    fast, plain = mlp(rank=rank)
    assert isinstance(fast, GatedModule)
    torch.manual_seed(1)
    x, flow = torch.randn(4, 40, 64).bfloat16(), torch.randn(4, 40, 64).bfloat16()
    exact = copy.deepcopy(plain).double()
    tensors = {}
    for name, module, kind in (
        ("fast", fast, torch.bfloat16),
        ("plain", plain, torch.bfloat16),
        ("exact", exact, torch.float64),
    ):
        leaf = x.clone().to(kind).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
            out = module(leaf)
        out.backward(flow.to(out.dtype))
        tensors[name] = [
            out.detach(),
            leaf.grad,
            *(parameter.grad for parameter in module.parameters() if parameter.requires_grad),
        ]
    assert counted == ["lora_gated_mlp", "lora_gated_mlp_backward"] and len(
        tensors["fast"]
    ) == 2 + 2 * 3 * bool(rank)
    for fast_one, plain_one, exact_one in zip(*tensors.values(), strict=True):
        assert relative(fast_one, exact_one) < max(1.5 * relative(plain_one, exact_one), BF16)


def test_what_the_operator_does_not_compute_runs_as_before(counted: list[str]) -> None:
    def thawed(module: Any) -> None:
        module.down_proj.base_layer.weight.requires_grad_()

    def disabled(module: Any) -> None:
        module.up_proj.enable_adapters(False)

    def hooked(module: Any) -> None:
        module.gate_proj.base_layer.register_forward_hook(lambda *_: None)

    def biased(module: Any) -> None:
        module.down_proj.base_layer.bias = nn.Parameter(
            torch.ones(64, dtype=torch.bfloat16), requires_grad=False
        )

    torch.manual_seed(2)
    x = torch.randn(4, 40, 64).bfloat16()
    for change in (thawed, disabled, hooked, biased):
        fast, plain = mlp(change)
        with torch.autocast("cpu", torch.bfloat16):
            assert relative(fast(x), plain(x).double()) < 2 * BF16
    assert not counted


def test_in_fp32_a_module_gives_what_transformers_and_peft_give(counted: list[str]) -> None:
    torch.manual_seed(2)
    x, tensors = torch.randn(4, 300, 64), []
    for module in mlp():
        module.float()
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        out.square().sum().backward()
        tensors.append(
            [
                out,
                leaf.grad,
                *(parameter.grad for parameter in module.parameters() if parameter.requires_grad),
            ]
        )
    assert counted == ["lora_gated_mlp", "lora_gated_mlp_backward"]
    for ours, theirs in zip(*tensors, strict=True):
        assert relative(ours, theirs.double()) < 1e-5


def test_of_what_lies_between_gate_and_up_alone_are_kept() -> None:
    module, _ = mlp()
    x, saved = torch.randn(2, 80, 64).bfloat16().requires_grad_(), {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    ranks = 3 * 4
    assert sum(size for place, size in saved.items() if place not in weights) <= 2 * 160 * (
        64 + 2 * 96 + ranks
    )


def test_few_rows_without_gradients_go_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, plain = mlp()
    monkeypatch.setattr(native, "kernels", lambda: pytest.fail("a kernel ran"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(1, 3, 64).bfloat16()
        assert relative(fast(x), plain(x).double()) < 2 * BF16


def test_dropout_in_training_keeps_a_module_as_it_is(counted: list[str]) -> None:
    config = T5Config(
        d_model=64,
        d_ff=96,
        d_kv=32,
        num_layers=1,
        num_heads=2,
        vocab_size=64,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.5,
    )
    model: Any = T5ForConditionalGeneration(config).bfloat16().requires_grad_(False)
    gate(model)
    module, x = model.encoder.block[0].layer[1].DenseReluDense, torch.randn(4, 40, 64).bfloat16()
    torch.manual_seed(0)
    dropped = module.train()(x)
    assert not counted
    whole = module.eval()(x.requires_grad_())
    assert counted == ["lora_gated_mlp"] and relative(dropped, whole.double()) > 0.1


def test_modules_of_one_class_are_compiled_once() -> None:
    model: Any = decoder(LlamaConfig, intermediate_size=96)
    gate(model)
    torch._dynamo.reset()
    x = torch.randn(4, 30, 64).bfloat16()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for layer in model.model.layers:
            layer.mlp.compile(fullgraph=True, backend="eager", dynamic=True)
        first, second = (layer.mlp for layer in model.model.layers)
        assert torch.equal(first(x), type(first).forward(first, x)) and torch.equal(
            second(x), type(second).forward(second, x)
        )
