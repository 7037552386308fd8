"""Names of other libraries, on whichever of their versions is installed."""

from __future__ import annotations

import inspect
import logging

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from vlm_tune.compat import (
    HARMLESS,
    cache_name,
    recompute_operator_inputs,
    without_harmless_warnings,
)
from vlm_tune.kernels.lora import lora_linear


def test_the_cache_is_given_and_returned_by_its_name() -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    assert cache_name() in inspect.signature(model.forward).parameters
    ids, cache = torch.arange(6)[None], DynamicCache()
    first = model(input_ids=ids[:, :4], use_cache=True, **{cache_name(): cache})
    second = model(input_ids=ids[:, 4:], use_cache=True, **{cache_name(): first[cache_name()]})
    assert first[cache_name()] is cache and cache.get_seq_length() == 6
    assert torch.allclose(second.logits, model(input_ids=ids).logits[:, 4:], atol=1e-5)


def test_warnings_are_left_out_within_a_call_alone() -> None:
    logger = logging.getLogger(HARMLESS[0])
    before = logger.level
    with without_harmless_warnings():
        assert not logger.isEnabledFor(logging.WARNING) and logger.isEnabledFor(logging.ERROR)
    assert logger.level == before


def test_a_compiled_backward_pass_makes_the_input_of_an_operator_anew() -> None:
    down, up = torch.randn(4, 32, requires_grad=True), torch.randn(16, 4, requires_grad=True)
    weight = torch.randn(16, 32)

    def normed_and_projected(x: torch.Tensor) -> torch.Tensor:
        rows = x * x.pow(2).mean(-1, keepdim=True).rsqrt()
        return lora_linear(rows, [weight], "", 0, False, None, [down], [up], [1.0])[0]

    def saved() -> list[torch.Size]:
        torch.compiler.reset()
        out = torch.compile(normed_and_projected, backend="aot_eager_decomp_partition")(
            torch.randn(64, 32, requires_grad=True)
        )
        assert out.grad_fn is not None
        return [tensor.shape for tensor in out.grad_fn.saved_tensors]  # type: ignore[attr-defined]

    whole = torch.Size((64, 32))
    assert saved().count(whole) == 2  # what the norm is given, and what it gives
    with recompute_operator_inputs():
        assert saved().count(whole) == 1
    assert saved().count(whole) == 2
