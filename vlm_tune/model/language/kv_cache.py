"""KV caches of transformers: of fixed or doubled size, one layer of them, and cut to a length."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from vlm_tune.compat import share_compiled_code, supports_static_cache

ROOM = 64
"""Decode steps for which a static KV cache has room at first."""


def takes_static_cache(model: Any, device: torch.device) -> bool:
    """Whether a transformers model decodes on this device by a KV cache of fixed size.

    On a GPU a cache that grows costs a copy a step, and shapes that no graph is for.
    """
    return device.type == "cuda" and supports_static_cache(model)


def static_cache(config: Any, length: int, device: torch.device) -> Any:
    """A KV cache of transformers with room for `length` tokens in every layer.

    Layers with a sliding window keep all tokens too.
    """
    from transformers.cache_utils import Cache, StaticCache, StaticLayer

    layers: list[Any] = []
    for each in StaticCache(config=config, max_cache_len=length).layers:
        layer = each if type(each) is StaticLayer else StaticLayer(max_cache_len=length)
        # Otherwise each layer would wait for a copy from the host.
        layer.cumulative_length = torch.zeros((), dtype=torch.int64, device=device)
        layers.append(layer)
    return Cache(layers=layers)


def enlarge_cache(cache: Any, length: int) -> None:
    """Gives a filled `static_cache` room for `length` tokens, which it copies; no host waits."""
    for layer in cache.layers:
        more = length - layer.keys.shape[-2]
        layer.keys = pad(layer.keys, (0, 0, 0, more))
        layer.values = pad(layer.values, (0, 0, 0, more))
        layer.max_cache_len = length


def steps_of_room(taken: int, left: int) -> int:
    """For how many further decode steps a static KV cache gets room.

    Room for all `left` steps would be read in every step, and most answers end long before; so it
    doubles with the steps `taken`.
    """
    return min(max(taken, ROOM), left)


def crop_cache(cache: Any, length: int) -> None:
    """Drops all but the first `length` tokens of a growing KV cache of transformers.

    Its own `crop` takes other numbers in every release.
    """
    for layer in cache.layers:
        layer.keys = layer.keys[..., :length, :]
        layer.values = layer.values[..., :length, :]


class LayerCache:
    """One layer of a static KV cache, as transformers' attention takes the whole.

    It is the same to all of a model's layers, where a cache is indexed by each layer's number; so
    torch.compile has one graph for all of them.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        for tensor in (layer.keys, layer.values, layer.cumulative_length):
            # transformers marks them so that there is a graph for each address.
            share_compiled_code(tensor)

    def update(self, keys: Any, values: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Writes new keys and values, and returns all of the layer's."""
        return self.layer.update(keys, values)

    def get_seq_length(self, *_: Any) -> Any:
        """The number of tokens in the cache."""
        return self.layer.get_seq_length()


def layer_cache(cache: Any, block: nn.Module) -> LayerCache | None:
    """The layer of a static KV cache that a block of a decoder reads and writes.

    None for a cache that grows, or whose first tokens have not come yet.
    """
    # The cache of an encoder-decoder is two caches, and has no layers.
    if not is_static_cache(cache):
        return None
    number = next((each.layer_idx for each in block.modules() if hasattr(each, "layer_idx")), None)
    if number is None or not cache.layers[number].is_initialized:
        return None
    return LayerCache(cache.layers[number])


def is_static_cache(cache: Any) -> bool:
    """Whether a KV cache of transformers is one of `static_cache`."""
    return bool(getattr(cache, "layers", ())) and cache.is_compileable
