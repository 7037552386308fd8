"""Names of other libraries, on whichever of their versions is installed."""

from __future__ import annotations

import inspect
import logging

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from vlm_tune.compat import HARMLESS, cache_name, without_harmless_warnings


def test_the_cache_is_given_and_returned_by_its_name() -> None:
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
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
