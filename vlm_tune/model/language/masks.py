"""What tokens of joined rows see, in a decoder's layers of every kind and in an encoder-decoder.

Shapes: B rows, L tokens, R tokens that look, C tokens that may be seen.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""Kinds of layers that see a part of what stands before, as transformers calls them, and the setting with its size in tokens."""
KINDS = ("full_attention", *WINDOWS)


def tree_mask(ends: torch.Tensor) -> torch.Tensor:
    """bool[B, 1, L, L]: token i sees token j where j <= i < ends[j]; padding, whose end is 0, sees itself alone."""
    place = torch.arange(ends.shape[1], device=ends.device)
    seen = (place[None, :] <= place[:, None]) & (place[:, None] < ends[:, None, :])
    return (seen | torch.eye(len(place), dtype=torch.bool, device=ends.device))[:, None]


def same_sample(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """bool[B, 1, R, C]: whether token r of rows [B, R] and token c of columns [B, C] belong to one sample."""
    return (rows[:, :, None] == columns[:, None, :])[:, None]


def additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask to add to attention scores: 0 where seen, the least number elsewhere."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


def layer_kinds(config: Any) -> set[str]:
    """The kinds of a decoder's layers, by what they see, from its transformers config."""
    kinds = getattr(config, "layer_types", None)
    return (
        set(kinds)
        if kinds
        else {
            next(
                (kind for kind, size in WINDOWS.items() if getattr(config, size, None)),
                "full_attention",
            )
        }
    )


def joining_reason(model: Any, body: Any) -> str | None:
    """Why rows of a transformers decoder with that body can't be joined, None where they can: a sample must see what it sees alone."""
    config = model.config.get_text_config()
    odd = sorted(layer_kinds(config) - {*KINDS})
    if model._is_stateful or odd:
        return f"its layers carry a state from token to token, or choose what they see ({', '.join(odd) or 'recurrent'})"
    if "local" in getattr(config, "attention_layers", ()):
        return "its local layers count tokens by their place in the row"
    if "position_ids" not in inspect.signature(body.forward).parameters or getattr(
        config, "alibi", False
    ):
        return "it counts distances by tokens' places in the row, and takes no positions"
    return None


def packing_reason(model: Any) -> str | None:
    """Why rows of a transformers encoder-decoder can't be packed, None where they can: samples share a row's positions."""
    encoder = model.get_encoder()
    if any("relative_attention_bias" in name for name, _ in encoder.named_parameters()):
        return None
    return "it knows where tokens are by their places in the row"


def layer_masks(
    config: Any, seen: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | dict[str, torch.Tensor]:
    """The masks [B, 1, R, C] that a decoder's layers add, from what its samples let tokens see, bool[B, 1, R, C].

    `rows` [B, R] and `columns` [B, C] are positions in the samples, by which windows and chunks are counted. One mask
    where all layers are of a kind, else one for each kind, as transformers' decoders take them.
    """
    text = config.get_text_config()
    found: dict[str, torch.Tensor] = {}
    for kind in layer_kinds(text):
        near = seen
        if kind == "sliding_attention":
            near = seen & (rows[:, None, :, None] - columns[:, None, None, :] < text.sliding_window)
        elif kind == "chunked_attention":
            near = seen & same_sample(
                rows // text.attention_chunk_size, columns // text.attention_chunk_size
            )
        found[kind] = additive(near, dtype)
    return found if len(found) > 1 else next(iter(found.values()))
