"""Attention masks of joined rows, for every kind of decoder layer and for encoder-decoders.

Shapes: B rows, L tokens, Q query tokens, C key tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import pad

from vlm_tune.compat import is_stateful

WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""transformers' kinds of layers that attend to a part of the earlier tokens only.

The values are the settings of the config that hold the part's size in tokens.
"""
KINDS = ("full_attention", *WINDOWS)


def image_blocks(image_mask: torch.Tensor) -> torch.Tensor:
    """The numbers int64[B, L] of the images that slots belong to, from 1 in each row.

    0 is for other tokens. `image_mask` is bool[B, L]. Markers stand between any two images.
    """
    begins = image_mask & ~pad(image_mask[:, :-1], (1, 0))
    return begins.cumsum(1) * image_mask


def same_block(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The mask bool[B, 1, Q, C] that is True where query and key are of one block.

    `rows` [B, Q] and `columns` [B, C] are the queries' and keys' numbers of blocks, 0 for none.
    """
    return same_sample(rows, columns) & (rows > 0)[:, None, :, None]


def tree_mask(visible_until: torch.Tensor, blocks: torch.Tensor | None = None) -> torch.Tensor:
    """The mask bool[B, 1, L, L] in which token i sees token j where j <= i < visible_until[b, j].

    `visible_until` is int[B, L]. With `blocks` int[B, L], the tokens of a block see each other both
    ways; 0 is none. Every token sees itself, so padding, whose value is 0, sees itself
    alone. A prefix p of two tokens and its branches a and b, then padding:

        visible_until   6 6 4 4 6 6 0
                        p p a a b b .
                    p   1 . . . . . .
                    p   1 1 . . . . .
                    a   1 1 1 . . . .
                    a   1 1 1 1 . . .
                    b   1 1 . . 1 . .
                    b   1 1 . . 1 1 .
                    .   . . . . . . 1
    """
    place = torch.arange(visible_until.shape[1], device=visible_until.device)
    visible = (place[None, :] <= place[:, None]) & (place[:, None] < visible_until[:, None, :])
    visible |= torch.eye(len(place), dtype=torch.bool, device=visible_until.device)
    return visible[:, None] if blocks is None else visible[:, None] | same_block(blocks, blocks)


def same_sample(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The mask bool[B, 1, Q, C] that is True where query and key belong to one sample.

    `rows` [B, Q] and `columns` [B, C] are the queries' and keys' numbers of samples (or of chunks).
    """
    return (rows[:, :, None] == columns[:, None, :])[:, None]


def additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask to add to attention scores: 0 where `visible`, else the type's least number."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)


def layer_kinds(config: Any) -> set[str]:
    """The attention kinds of a decoder's layers, from its transformers config."""
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
    """The reason why samples can't be joined in rows of a transformers decoder, None if they can.

    In a joined row, a sample must see exactly what it sees in a row of its own.
    """
    config = model.config.get_text_config()
    odd = sorted(layer_kinds(config) - {*KINDS})
    if is_stateful(model) or odd:
        return (
            "its layers carry a state from token to token, or choose what they see "
            f"({', '.join(odd) or 'recurrent'})"
        )
    if "local" in getattr(config, "attention_layers", ()):
        return "its local layers count tokens by their place in the row"
    if "position_ids" not in inspect.signature(body.forward).parameters or getattr(
        config, "alibi", False
    ):
        return "it counts distances by tokens' places in the row, and takes no positions"
    return None


def shared_rotation_reason(model: Any) -> str | None:
    """The reason why a row of a transformers decoder depends on longer ones beside it, None if not.

    transformers rotates all rows of a call as the longest one needs it.
    """
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    # Some have parameters for each kind of layer.
    kinds = [
        each.get("rope_type")
        for each in (parameters, *parameters.values())
        if isinstance(each, Mapping)
    ]
    for kind in ("dynamic", "longrope"):
        if kind in kinds:
            return f"its rotary positions ({kind}) are those of the longest row beside it"
    return None


def packing_reason(model: Any) -> str | None:
    """The reason why rows of a transformers encoder-decoder can't be packed, None if they can.

    Samples of a packed row share its positions, so positions must be relative.
    """
    encoder = model.get_encoder()
    if any("relative_attention_bias" in name for name, _ in encoder.named_parameters()):
        return None
    return "it knows where tokens are by their places in the row"


def layer_masks(
    config: Any,
    visible: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """The additive masks of a decoder's layers.

    Args:
        config: The model's transformers config.
        visible: bool[B, 1, Q, C], what tokens see by their samples.
        rows: Positions [B, Q] of queries in their samples, from which windows and chunks are
            counted.
        columns: Positions [B, C] of keys.
        dtype: The type of the masks.

    Returns:
        One mask [B, 1, Q, C] if all layers are of one kind, else one for each kind by name, as
        transformers decoders take them.
    """
    text = config.get_text_config()
    masks: dict[str, torch.Tensor] = {}
    for kind in layer_kinds(text):
        near = visible
        if kind == "sliding_attention":
            near = visible & (
                rows[:, None, :, None] - columns[:, None, None, :] < text.sliding_window
            )
        elif kind == "chunked_attention":
            near = visible & same_sample(
                rows // text.attention_chunk_size, columns // text.attention_chunk_size
            )
        masks[kind] = additive(near, dtype)
    return masks if len(masks) > 1 else next(iter(masks.values()))
