"""Attention masks of joined rows, for every kind of decoder layer and for encoder-decoders.

Shapes: B rows, L tokens, Q query tokens, C key tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import pad

from vlm_tune.compat import is_stateful
from vlm_tune.data.batch import Batch
from vlm_tune.data.types import IGNORE_INDEX

WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""transformers' kinds of layers that attend to a part of the earlier tokens only.

The values are the settings of the config that hold the part's size in tokens.
"""
KINDS = ("full_attention", *WINDOWS)


@dataclass(frozen=True)
class Blocks:
    """Tokens that see each other both ways, by the numbers of their blocks: 0 is none.

    Attributes:
        queries: The queries' numbers int64[B, Q].
        keys: The keys' numbers int64[B, C].
        unlimited: bool[B, Q], queries that no layer's window limits; None: windows limit all.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    unlimited: torch.Tensor | None = None

    def padded(self, before: int = 0, after: int = 0) -> Blocks:
        """With keys of no block before and after the others."""
        return replace(self, keys=pad(self.keys, (before, after)))

    def last(self, count: int) -> Blocks:
        """With the last `count` tokens alone, virtual ones before them included, as queries."""

        def cut(queries: torch.Tensor) -> torch.Tensor:
            missing = count - queries.shape[1]
            return pad(queries, (missing, 0)) if missing > 0 else queries[:, -count:]

        unlimited = None if self.unlimited is None else cut(self.unlimited)
        return replace(self, queries=cut(self.queries), unlimited=unlimited)

    @property
    def pairs(self) -> torch.Tensor:
        """The mask bool[B, 1, Q, C] that is True where query and key are of one block."""
        return same_sample(self.queries, self.keys) & (self.queries > 0)[:, None, :, None]


def image_blocks(batch: Batch) -> Blocks:
    """The slots of each image of a batch's rows. Markers stand between any two images."""
    begins = batch.image_mask & ~pad(batch.image_mask[:, :-1], (1, 0))
    numbers = begins.cumsum(1) * batch.image_mask
    return Blocks(numbers, numbers)


def prompt_blocks(batch: Batch) -> Blocks:
    """The prompt of each sample of a batch's rows: up to what predicts its first trained token.

    Rows without labels are prompts. The samples of a row with branches are answers to one prompt,
    whose last token, which predicts an answer's first one, is repeated in each of them. The prompt
    sees that of the first one; the others have the same states.
    """
    labelled = (batch.labels != IGNORE_INDEX).long()
    before = labelled.cumsum(1) - labelled
    samples = batch.packed
    if samples is None or batch.positions is None:
        prompt = (before == 0) & batch.attention_mask
        return Blocks(prompt.long(), prompt.long(), prompt)
    begins = samples != pad(samples[:, :-1], (1, 0), value=-1)
    place = torch.arange(samples.shape[1], device=samples.device).expand_as(samples)
    first = torch.where(begins, place, 0).cummax(1).values
    opening = before == before.gather(1, first)
    numbers = begins.cumsum(1)
    # The position of the prompt's last token, of each sample.
    last = torch.zeros_like(numbers).scatter_reduce(
        1, numbers - 1, batch.positions * opening, "amax"
    )
    prompt = (batch.positions <= last.gather(1, numbers - 1)) & batch.attention_mask
    # A later branch continues at a position that is behind its place.
    in_first = prompt & opening & (batch.positions == place - first)
    return Blocks(numbers * in_first, numbers * in_first, prompt)


def tree_mask(visible_until: torch.Tensor) -> torch.Tensor:
    """The mask bool[B, 1, L, L] in which token i sees token j where j <= i < visible_until[b, j].

    `visible_until` is int[B, L]. Every token sees itself, so padding, whose value is 0, sees itself
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
    return (visible | torch.eye(len(place), dtype=torch.bool, device=visible_until.device))[:, None]


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


def shortest_window(config: Any) -> int | None:
    """The fewest tokens that a layer sees of a long row; None if all see the whole of it."""
    text = config.get_text_config()
    return min(
        (getattr(text, WINDOWS[kind]) for kind in layer_kinds(text) & {*WINDOWS}), default=None
    )


def joining_reason(model: Any, body: Any) -> str | None:
    """The reason why samples can't be joined in rows of a transformers decoder, None if they can.

    In a joined row, a sample must see exactly what it sees in a row of its own.
    """
    config = model.config.get_text_config()
    odd = sorted(layer_kinds(config) - {*KINDS})
    if is_stateful(model) or odd:
        return (
            "its layers carry state from token to token, or select what they attend to "
            f"({', '.join(odd) or 'recurrent'})"
        )
    if "local" in getattr(config, "attention_layers", ()):
        return "its local layers count tokens by their position in the row"
    if "position_ids" not in inspect.signature(body.forward).parameters or getattr(
        config, "alibi", False
    ):
        return "it measures distances by position in the row, and takes no position ids"
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
    return "it derives positions from the order in the row"


def layer_masks(
    config: Any,
    visible: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    dtype: torch.dtype,
    blocks: Blocks | None = None,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """The additive masks of a decoder's layers.

    Args:
        config: The model's transformers config.
        visible: bool[B, 1, Q, C], what tokens see by their samples.
        rows: Positions [B, Q] of queries in their samples, from which windows and chunks are
            counted.
        columns: Positions [B, C] of keys.
        dtype: The type of the masks.
        blocks: Which of them see each other both ways, too.

    Returns:
        One mask [B, 1, Q, C] if all layers are of one kind, else one for each kind by name, as
        transformers decoders take them.
    """
    text = config.get_text_config()
    masks: dict[str, torch.Tensor] = {}
    if blocks is not None:
        visible = visible | blocks.pairs
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
        if blocks is not None and blocks.unlimited is not None:
            near = near | (visible & blocks.unlimited[:, None, :, None])
        masks[kind] = additive(near, dtype)
    return masks if len(masks) > 1 else next(iter(masks.values()))
