"""4-bit layers as the engines shard them: they compute what those of bitsandbytes compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from tests.helpers.tiny_models import LORA_TUNE, parsed, rows_of, save_llm, with_llm, with_tune
from vlm_tune.compat import keep_gradients_of_packed_layers
from vlm_tune.kernels import devices
from vlm_tune.model.acceleration.lora_layers import LoraLinear
from vlm_tune.model.acceleration.sharded_4bit import Sharded4bit, replace_4bit_layers
from vlm_tune.model.build import bare_model, build
from vlm_tune.model.tuning import apply_rules

WIDTH = 64


def layers(kind: str, *, bias: bool = True, nested: bool = False) -> Any:
    """Two layers in 4 bits, of which the first has an adapter of PEFT's."""
    torch.manual_seed(1)
    model = nn.Sequential(
        *(Linear4bit(WIDTH, WIDTH, bias, compress_statistics=nested, quant_type=kind) for _ in "ab")
    ).to("cpu")
    keep_gradients_of_packed_layers(model)
    config = LoraConfig(target_modules=["0"], init_lora_weights=False, r=4)
    config._register_custom_module({Linear4bit: LoraLinear})
    LoraModel(model, {"default": config}, "default")
    return model


def passes(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of x and of the adapter, for a sum of squares."""
    model.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    output.float().square().sum().backward()
    gradients = [each.grad for each in (leaf, *model.parameters()) if each.grad is not None]
    assert len(gradients) == 3
    return [output.detach(), *gradients]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("operator", [False, True])
def test_outputs_and_gradients_are_bitsandbytes(
    kind: str, operator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "by_operator", lambda device: operator)
    whole, sharded = layers(kind), layers(kind)
    replace_4bit_layers(sharded)
    assert [type(layer) for layer in (sharded[0].base_layer, sharded[1])] == [Sharded4bit] * 2
    assert sharded[0].is_plain(torch.empty(1, WIDTH))
    frozen = [each for name, each in sharded.named_parameters() if name.endswith(("t", "scales"))]
    assert [each.dtype for each in frozen].count(torch.uint8) == 4
    for x, bound in ((torch.randn(3, 5, WIDTH), 1e-5), (torch.randn(2, WIDTH).bfloat16(), 2e-2)):
        for ours, theirs in zip(passes(sharded, x), passes(whole, x), strict=True):
            assert ours.dtype == theirs.dtype
            assert float((ours - theirs).norm() / theirs.norm()) <= bound
        with torch.no_grad():
            assert torch.allclose(sharded(x), whole(x), rtol=bound, atol=bound)


def test_they_are_traced_in_one_graph_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "by_operator", lambda device: False)
    model = layers("nf4")
    replace_4bit_layers(model)
    x = torch.randn(6, WIDTH)
    eager = passes(model, x)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
    for traced, wanted in zip(passes(compiled, x), eager, strict=True):
        assert torch.allclose(traced, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantize", ["nf4", "fp4"])
@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_a_rank_without_weights_has_the_same_parameters(
    kind: str, quantize: str, tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """What the engines send from the first rank to the others, in its order."""
    text = tiny_recipe(kind, precision="bf16")
    folder = save_llm(tmp_path / kind, kind, rows_of(parsed(text)))
    recipe = parsed(with_tune(with_llm(text, folder, kind, f", quantize: {quantize}"), LORA_TUNE))
    parameters = []
    for bare in (False, True):
        model = build(recipe, [], bare=bare)
        apply_rules(model, recipe.tune, learning_rate=1e-3, precision=torch.bfloat16)
        replace_4bit_layers(model)
        kinds = [type(layer) for layer in model.llm.modules()]
        assert kinds.count(Sharded4bit) == kinds.count(LoraLinear) > 0
        assert all(layer.packed for layer in model.llm.modules() if isinstance(layer, LoraLinear))
        parameters.append(
            [
                (name, each.shape, each.dtype, each.requires_grad)
                for name, each in model.named_parameters()
            ]
        )
        buffers = dict(model.named_buffers())
        assert not [name for name in buffers if name.endswith("scales")]
    assert parameters[0] == parameters[1]


def test_a_plan_counts_fp4_as_nf4(tiny_recipe: Callable[..., str], tmp_path: Path) -> None:
    text = tiny_recipe("causal")
    folder = save_llm(tmp_path / "llm", "causal", rows_of(parsed(text)))
    sizes = [
        sum(each.nbytes for each in bare_model(parsed(changed))[0].llm.parameters())
        for changed in (
            with_tune(with_llm(text, folder, "causal", f", quantize: {kind}"), LORA_TUNE)
            for kind in ("nf4", "fp4", "int8")
        )
    ]
    assert sizes[0] == sizes[1] < sizes[2]


def test_scales_that_are_quantised_are_written_out() -> None:
    """As in a checkpoint with double quantisation, whose scales have scales themselves."""
    whole, sharded = layers("nf4", nested=True), layers("nf4", nested=True)
    assert whole[1].weight.quant_state.nested
    replace_4bit_layers(sharded)
    assert sharded[1].scales.numel() == 4 * WIDTH * WIDTH // 64
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(sharded[1](x), whole[1](x), rtol=1e-5, atol=1e-5)
