"""Decoder layers by one kernel against transformers' and PEFT's own in double precision.

Also where they go back to those.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from vlm_tune.compat import cache_name
from vlm_tune.kernels import decoder as kernels_decoder
from vlm_tune.kernels.cpu import native
from vlm_tune.kernels.decoder import saved_bytes
from vlm_tune.kernels.reference_decoder import reference
from vlm_tune.model.acceleration.decoder_layers import DecoderLayer
from vlm_tune.model.acceleration.install import LAYER, MLP, install
from vlm_tune.model.acceleration.interval_attention import NAMES
from vlm_tune.model.acceleration.lora_layers import LoraLinear, merge_projections
from vlm_tune.model.language.causal import CausalLLM

needs_kernel = pytest.mark.usefixtures("kernels")

BF16 = 2**-8
ROWS, LENGTH = 3, 45


def decoder(
    kind: str = "llama",
    rank: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    targets: str = "all-linear",
    ranks: dict[str, int] | None = None,
    **settings: Any,
) -> Any:
    """A decoder of two layers with LoRA on some or all linear layers, and telling weights."""
    torch.manual_seed(rank)
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = AutoConfig.for_model(
        kind,
        **{
            **sizes,
            "head_dim": 32,
            "vocab_size": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **settings,
        },
    )
    config.sliding_window = None
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.copy_(torch.randn_like(parameter) * 0.3 + ("norm" in name))
    inject_adapter_in_model(
        LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=targets,
            rank_pattern=ranks or {},
            init_lora_weights=False,
        ),
        model,
    )
    for module in model.modules():
        if isinstance(module, PeftLinear):
            module.__class__ = LoraLinear
            module.lora_A.float(), module.lora_B.float()
    return model.train()


def plain(model: Any) -> Any:
    """Its double by transformers and PEFT, in double precision."""
    other = copy.deepcopy(model).double()
    for module in other.modules():
        if isinstance(module, LoraLinear):
            module.__class__ = PeftLinear
    other.config._attn_implementation = "eager"
    return other


def quick(model: Any) -> Any:
    report = install(CausalLLM(model))
    assert report.replaced[MLP] == 2 and report.replaced[LAYER] == 2, str(report)
    merge_projections(model)
    return model


def given() -> tuple[Tensor, Tensor, Tensor]:
    """x [B, L, E], where tokens cease to be seen, and positions."""
    torch.manual_seed(1)
    ends = torch.full((ROWS, LENGTH), LENGTH, dtype=torch.int32)
    ends[:, 20:30], ends[1, 30:37] = 30, 37
    positions = torch.arange(LENGTH).expand(ROWS, -1).clone()
    positions[:, 30:] -= 10
    return torch.randn(ROWS, LENGTH, 128).bfloat16(), ends, positions


def run(model: Any, x: Tensor, ends: Tensor, positions: Tensor) -> Tensor:
    if model.config._attn_implementation in NAMES.values():
        mask: Tensor = ends[:, None, None]
    else:
        token = torch.arange(LENGTH)
        seen = (token[None, None, :] <= token[None, :, None]) & (
            token[None, :, None] < ends[:, None, :]
        )
        mask = torch.where(seen[:, None], 0.0, -1e30).to(x.dtype)
    return model.model(
        inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state


def relative(actual: Tensor, wanted: Tensor) -> float:
    return float(
        (actual.detach().double() - wanted.detach().double()).norm()
        / wanted.detach().double().norm()
    )


class Counted:
    """The kernels, and how often a layer was one of them."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name in ("decoder", "decoder_backward"):
            self.calls.append(name)
        return getattr(native.library(native.KERNELS), name)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    library = Counted()
    monkeypatch.setattr(native, "kernels", lambda: library)
    yield library.calls


@needs_kernel
@pytest.mark.parametrize(
    ("kind", "rank", "settings"),
    [
        ("llama", 8, {}),
        ("llama", 40, {"num_key_value_heads": 4, "intermediate_size": 320}),
        ("llama", 16, {"attention_bias": True, "num_attention_heads": 8, "rms_norm_eps": 0.1}),
        ("qwen2", 4, {}),
        ("llama", 4, {"targets": ".*self_attn.*_proj"}),
        ("llama", 8, {"ranks": {"k_proj": 3, "o_proj": 33, "up_proj": 20}}),
        ("mistral", 16, {"num_key_value_heads": 1, "head_dim": 64}),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_outputs_and_gradients_are_those_of_transformers_and_peft(
    kind: str, rank: int, settings: dict[str, Any], checkpointing: bool, counted: list[str]
) -> None:
    model = decoder(kind, rank, **settings)
    exact, (x, *rest) = plain(model), given()
    quick(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    flow = torch.randn_like(x)
    rows, doubles = x.clone().requires_grad_(), x.double().requires_grad_()
    output, wanted = run(model, rows, *rest), run(exact, doubles, *rest)
    output.backward(flow)
    wanted.backward(flow.double())
    assert (
        counted.count("decoder") == (4 if checkpointing else 2)
        and counted.count("decoder_backward") == 2
    )
    assert relative(output, wanted) < 3 * BF16
    assert (
        rows.grad is not None
        and doubles.grad is not None
        and relative(rows.grad, doubles.grad) < 4 * BF16
    )
    for (name, parameter), (_, other) in zip(
        model.named_parameters(), exact.named_parameters(), strict=True
    ):
        if parameter.requires_grad:
            assert (
                parameter.grad is not None
                and parameter.grad.dtype == parameter.dtype
                and relative(parameter.grad, other.grad) < 6 * BF16
            ), name
        else:
            assert parameter.grad is None
    with torch.no_grad():
        assert torch.equal(run(model, x, *rest), output)


@needs_kernel
def test_weights_in_four_bits_are_unpacked_for_a_pass(counted: list[str]) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    model, (x, *rest) = decoder(), given()
    exact = plain(model)
    for layer, other in zip(model.modules(), exact.modules(), strict=True):
        if isinstance(layer, LoraLinear):
            base: Any = layer.base_layer
            packed = Linear4bit(
                base.in_features,
                base.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
            )
            packed.weight = Params4bit(
                base.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False
            )
            layer.base_layer = packed.to("cpu")
            state: Any = packed.weight.quant_state
            other.base_layer.weight.data = dequantize_4bit(packed.weight.data, state).double()
    quick(model)
    output, wanted = run(model, x, *rest), run(exact, x.double(), *rest)
    output.float().pow(2).sum().backward()
    wanted.pow(2).sum().backward()
    assert relative(output, wanted) < 3 * BF16
    for (name, parameter), (_, other) in zip(
        ((name, each) for name, each in model.named_parameters() if "lora_" in name),
        ((name, each) for name, each in exact.named_parameters() if "lora_" in name),
        strict=True,
    ):
        assert parameter.grad is not None and relative(parameter.grad, other.grad) < 6 * BF16, name
    assert counted == ["decoder"] * 2 + ["decoder_backward"] * 2


@needs_kernel
def test_where_nothing_flows_further_the_gradients_are_the_same(counted: list[str]) -> None:
    model, (x, *rest) = quick(decoder()), given()
    grads = []
    for leaf in (x, x.clone().requires_grad_()):
        model.zero_grad()
        run(model, leaf, *rest).float().pow(2).sum().backward()
        grads.append(
            [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
        )
    assert len(counted) == 8
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@needs_kernel
def test_heads_of_a_width_that_no_tile_holds_leave_a_layer_as_it_is(counted: list[str]) -> None:
    model, (x, *rest) = decoder(head_dim=16), given()
    exact = plain(model)
    quick(model)
    output = run(model, x.clone().requires_grad_(), *rest)
    output.float().sum().backward()
    assert not counted and relative(output, run(exact, x.double(), *rest)) < 3 * BF16


@needs_kernel
@pytest.mark.parametrize("kind", ["gemma", "qwen3", "granite", "olmo2", "cohere", "phi3"])
def test_layers_that_compute_something_else_are_left_as_they_are(kind: str) -> None:
    model = decoder(kind, **{"granite": {"residual_multiplier": 0.5}}.get(kind, {}))
    report = install(CausalLLM(model))
    assert not report.replaced[LAYER] and report.skipped[LAYER].total() == 2
    assert not any(isinstance(module, DecoderLayer) for module in model.modules())


@needs_kernel
def test_layers_are_known_one_by_one(counted: list[str]) -> None:
    """SmolLM3 turns the queries and keys of some of its layers, and no others."""
    model, (x, *rest) = decoder("smollm3", no_rope_layers=[1, 0]), given()
    exact = plain(model)
    llm = CausalLLM(model)
    torch.manual_seed(3)
    report = install(llm)
    assert report.replaced[LAYER] == 1
    assert report.skipped[LAYER] == {"it computes another formula": 1}
    assert install(llm) == report
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    merge_projections(model)
    assert relative(run(model, x, *rest), run(exact, x.double(), *rest)) < 3 * BF16
    assert counted == ["decoder"]


def trained_norm(layer: Any) -> None:
    layer.input_layernorm.weight.requires_grad_()


def hooked(layer: Any) -> None:
    layer.self_attn.o_proj.register_forward_hook(lambda *_: None)


def hooked_within(layer: Any) -> None:
    layer.mlp.up_proj.base_layer.register_forward_hook(lambda *_: None)


def disabled(layer: Any) -> None:
    layer.self_attn.k_proj.enable_adapters(False)


def merged(layer: Any) -> None:
    layer.mlp.down_proj.merge()


def moved(layer: Any) -> None:
    base = layer.self_attn.o_proj.base_layer
    base.weight = torch.nn.Parameter(base.weight * 2, requires_grad=False)


@needs_kernel
@pytest.mark.parametrize(
    ("change", "runs"),
    [(trained_norm, 1), (hooked, 1), (hooked_within, 1), (disabled, 1), (merged, 1), (moved, 2)],
)
def test_a_layer_that_was_changed_after_a_run_computes_what_it_is_now(
    change: Callable[[Any], None], runs: int, counted: list[str]
) -> None:
    model, (x, *rest) = quick(decoder()), given()
    run(model, x, *rest)
    counted.clear()
    change(model.model.layers[1])
    output = run(model, x, *rest)
    assert len(counted) == runs
    exact = plain(model)
    assert relative(output, run(exact, x.double(), *rest)) < 3 * BF16


@needs_kernel
def test_adapters_that_learn_or_are_loaded_are_seen(counted: list[str]) -> None:
    model, (x, *rest) = quick(decoder()), given()
    before = run(model, x, *rest)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    after = run(model, x, *rest)
    assert relative(after, before) > 0.01
    assert relative(after, run(plain(model), x.double(), *rest)) < 5 * BF16
    assert len(counted) == 4


@needs_kernel
def test_a_copy_of_a_layer_that_ran_runs_by_its_own_weights(counted: list[str]) -> None:
    model, (x, *rest) = quick(decoder()), given()
    output = run(model, x, *rest)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    merge_projections(other)
    assert torch.equal(run(other, x, *rest), output)
    assert len(counted) == 4


@needs_kernel
def test_fp32_and_masks_of_transformers_run_as_before(counted: list[str]) -> None:
    model, (x, *rest) = quick(decoder(dtype=torch.float32)), given()
    model.config._attn_implementation = "eager"
    assert relative(run(model, x.float(), *rest), run(plain(model), x.double(), *rest)) < 1e-5
    model = quick(decoder())
    model.config._attn_implementation = "eager"
    run(model, x, *rest)
    cache = model(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=True)[cache_name()]
    assert cache.get_seq_length() == 4
    assert not counted


@needs_kernel
@pytest.mark.parametrize("settings", [{}, {"attention_bias": True}])
def test_the_reference_body_computes_the_same(settings: dict[str, Any]) -> None:
    model, (x, ends, positions) = quick(decoder(**settings)), given()
    layer: Any = model.model.layers[0]
    cos, sin = model.model.rotary_emb(x, positions)
    kernel = layer(x, attention_mask=ends[:, None, None], position_embeddings=(cos, sin))
    assert relative(kernel, reference(x, cos, sin, ends, layer.operands(x))) < 3 * BF16


@needs_kernel
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("settings", [{}, {"ranks": {"k_proj": 3, "o_proj": 33, "up_proj": 20}}])
def test_the_size_of_saved_bytes_is_the_kernels_own(settings: dict[str, Any], keep: bool) -> None:
    layer: Any = quick(decoder(**settings)).model.layers[0]
    of = layer.operands(given()[0])
    addressed = kernels_decoder._Addressed(of, of.matrices(given()[0]), 128)
    for rows, length in ((1, 1), (2, 31), (3, 45)):
        room = native.kernels().decoder_room(addressed.pointer, rows, length, keep)
        assert saved_bytes(of, rows, length, keep=keep) == room
        scratch = kernels_decoder._scratch(of, torch.empty(rows, length, 128))
        assert len(scratch) == native.kernels().decoder_scratch(addressed.pointer, rows, length)


@needs_kernel
def test_tensors_of_several_devices_are_refused() -> None:
    model, (x, ends, positions) = quick(decoder()), given()
    layer: Any = model.model.layers[0]
    of = layer.operands(x)
    cos, sin = model.model.rotary_emb(x, positions)
    with pytest.raises(ValueError, match="tensors of one device, got cpu and meta"):
        kernels_decoder.decoder_layer(x, cos, sin.to("meta"), ends, of)
