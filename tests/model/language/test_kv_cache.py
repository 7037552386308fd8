"""KV caches of transformers: of fixed size, one layer of them, and cut to a length."""

from __future__ import annotations

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, MistralConfig, MistralForCausalLM

from vlm_tune.compat import cache_name, supports_static_cache
from vlm_tune.model.language.kv_cache import (
    crop_cache,
    is_static_cache,
    layer_cache,
    static_cache,
)


def test_a_static_cache_keeps_all_tokens_and_each_block_gets_its_layer() -> None:
    config = MistralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=2,
    )
    model = MistralForCausalLM(config).eval()
    assert supports_static_cache(model)
    cache = static_cache(config, 9, torch.device("cpu"))
    assert is_static_cache(cache) and not is_static_cache(DynamicCache())
    assert not is_static_cache(EncoderDecoderCache(cache, DynamicCache()))
    first: nn.Module = model.model.layers[0]
    assert layer_cache(cache, first) is None
    model(input_ids=torch.arange(5)[None], use_cache=True, **{cache_name(): cache})
    layer = layer_cache(cache, model.model.layers[1])
    assert layer is not None and int(layer.get_seq_length()) == 5
    assert cache.layers[1].keys.shape == (1, 1, 9, 8)
    keys, values = layer.update(torch.ones(1, 1, 1, 8), torch.ones(1, 1, 1, 8))
    assert keys is cache.layers[1].keys and values is cache.layers[1].values
    assert bool((keys[0, 0, 5] == 1).all()) and not keys[0, 0, 6:].any()
    assert layer_cache(cache, nn.Linear(1, 1)) is None


def test_a_growing_cache_is_cut_to_its_first_tokens() -> None:
    cache = DynamicCache()
    states = torch.arange(24.0).view(1, 2, 6, 2)
    cache.update(states, states + 1, 0)
    crop_cache(cache, 4)
    assert cache.get_seq_length() == 4
    assert torch.equal(cache.layers[0].values, states[..., :4, :] + 1)
    cache.update(states[..., :1, :], states[..., :1, :], 0)
    assert cache.get_seq_length() == 5
    crop_cache(DynamicCache(), 3)
