"""Attention of decoders on CUDA, by FlexAttention for joined rows.

FlexAttention computes the pairs of a joined row that see each other, block by block, and skips the
blocks in which none do. A row of one sample needs no mask: its padding is on the right, so that no
token sees it, and a plain causal attention is exact. Other rows go by masks, as do decode steps.

Shapes: B rows, H query heads, G key heads, L tokens, D head width, N blocks of a row.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from vlm_tune.compat import attention_name, flex_attention
from vlm_tune.model.language.attention import MaskedAttention, whole_rows
from vlm_tune.model.language.masks import WINDOWS, Blocks, layer_kinds

DEVICE = "cuda"
"""The type of the devices that all of this is for."""

BLOCK = 128
"""Tokens of a block, queries and keys: FlexAttention's own size."""

LONG = 512
"""Tokens of a row from which FlexAttention is chosen by itself.

Below, a mask of [L, L] is small, and FlexAttention would be compiled for little.
"""

WIDTHS = (16, 256)
"""The narrowest and the widest head that FlexAttention is used for."""

CAPABILITY = (8, 0)
"""The least compute capability of a GPU on which FlexAttention is used."""

UNSUPPORTED = (
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "kv_lora_rank",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "alibi",
)
"""Settings of a language model with which its attention is not what is computed here."""

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""FlexAttention's form of a change of scores: of row b, head h, query q and key k."""

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""FlexAttention's form of a mask: whether query q of row b and head h sees key k."""


def config_reason(model: Any) -> str | None:
    """The reason why FlexAttention does not compute a transformers decoder's attention, or None."""
    config = model.config
    kinds = layer_kinds(config) - {"full_attention", *WINDOWS}
    if kinds:
        return f"its layers attend in other ways ({', '.join(sorted(kinds))})"
    for name in UNSUPPORTED:
        if getattr(config, name, None):
            return f"its config has {name}"
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return "its attention has sinks"
    width = head_width(config)
    if not WIDTHS[0] <= width <= WIDTHS[1]:
        return f"heads are {width} wide, and not {WIDTHS[0]} to {WIDTHS[1]}"
    return None


def device_reason(device: torch.device) -> str | None:
    """The reason why FlexAttention, which has to be compiled, does not run on a device, or None."""
    if device.type != DEVICE:
        return f"it is for CUDA, not {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < CAPABILITY:
        major, minor = CAPABILITY
        return f"the GPU's compute capability is below {major}.{minor}"
    return None


def head_width(config: Any) -> int:
    """D, the width of a head."""
    return getattr(config, "head_dim", None) or (config.hidden_size // config.num_attention_heads)


class CudaAttention(MaskedAttention):
    """Attention on CUDA; on other devices it is by masks.

    Attributes:
        reason: The reason why FlexAttention is not used; None if it is.
        shortest: Tokens of a row from which FlexAttention is used.
    """

    def __init__(self, reason: str | None, shortest: int = LONG) -> None:
        self.reason = reason
        self.shortest = shortest

    def mask(
        self,
        model: Any,
        row_mask: Tensor,
        visible_until: Tensor | None,
        positions: Tensor | None,
        dtype: torch.dtype,
        length: int,
        *,
        joinable: bool,
        blocks: Blocks | None = None,
    ) -> Any:
        device = row_mask.device
        if blocks is not None:
            return super().mask(
                model,
                row_mask,
                visible_until,
                positions,
                dtype,
                length,
                joinable=joinable,
                blocks=blocks,
            )
        unjoined = visible_until is None or positions is None
        if unjoined and joinable and device.type == DEVICE and self._causal(model, length):
            mark = torch.zeros(1, 1, 1, 1, dtype=torch.int8, device=device)
            return by_kind(model.config, lambda _: mark)
        if not joinable or not self._flex(length, device):
            return super().mask(
                model, row_mask, visible_until, positions, dtype, length, joinable=joinable
            )
        if visible_until is None or positions is None:
            visible_until, positions = whole_rows(row_mask)
        return block_masks(model.config, visible_until, positions)

    def words(self, model: Any, device: torch.device) -> str:
        """How a model attends on a CUDA device, for the log."""
        name = attention_name(model).rsplit("_", 1)[-1]
        plain = f"{name}, causal without a mask" if name == "sdpa" else f"{name} by masks"
        reason = self.reason or device_reason(device)
        if reason is not None:
            return f"{plain}; joined rows by masks (flex: {reason})"
        return f"flex in joined rows of {self.shortest} tokens or more, else {plain}"

    def _flex(self, length: int, device: torch.device) -> bool:
        return self.reason is None and length >= self.shortest and device_reason(device) is None

    def _causal(self, model: Any, length: int) -> bool:
        """Whether rows of one sample attend as a plain causal attention by torch does."""
        config = model.config.get_text_config()
        return attention_name(model).endswith("sdpa") and all(
            kind == "full_attention"
            or (kind in WINDOWS and length <= (getattr(config, WINDOWS[kind]) or length))
            for kind in layer_kinds(config)
        )


def by_kind(config: Any, mask: Callable[[str], Any]) -> Any:
    """The masks of a decoder's layers, as transformers decoders take them.

    It is one mask if all layers are of one kind, else one for each kind by name.
    """
    masks = {kind: mask(kind) for kind in layer_kinds(config.get_text_config())}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def is_causal_mark(mask: Any) -> bool:
    """Whether a mask stands for a plain causal attention."""
    return isinstance(mask, Tensor) and mask.dtype == torch.int8


def block_masks(config: Any, visible_until: Tensor, positions: Tensor) -> Any:
    """The masks of a decoder's layers for FlexAttention, one for each kind of layer.

    Args:
        config: The model's transformers config.
        visible_until: int[B, L], see `tree_mask`.
        positions: Positions [B, L] in the samples, from which windows and chunks are counted.

    Returns:
        See `by_kind`.
    """
    text = config.get_text_config()

    def mask(kind: str) -> BlockMask:
        if kind == "full_attention":
            return interval_block_mask(visible_until)
        size = getattr(text, WINDOWS[kind])
        first = positions - size + 1 if kind == "sliding_attention" else positions // size * size
        return interval_block_mask(visible_until, positions, first)

    return by_kind(config, mask)


def interval_block_mask(
    visible_until: Tensor, positions: Tensor | None = None, first: Tensor | None = None
) -> BlockMask:
    """The mask of `tree_mask` for FlexAttention, without anything of size [L, L].

    Which blocks are empty, full or neither follows from the least and the largest numbers of their
    tokens.

    Args:
        visible_until: int[B, L], see `tree_mask`.
        positions: Positions int[B, L] of keys in their samples, with `first`.
        first: int[B, L], the least position of a key that each query sees; None if it sees all.
    """
    length = visible_until.shape[1]
    visible_until = visible_until.int().contiguous()
    blocks = -(-length // BLOCK)
    begins = torch.arange(blocks, device=visible_until.device) * BLOCK
    earlier = begins[None, :] < begins[:, None]
    least, largest = _extremes(visible_until)
    # [B, N, N] over blocks of queries and of keys. A block's own tokens see themselves at least.
    seen = earlier & (largest[:, None, :] > begins[:, None])
    full = earlier & (least[:, None, :] >= begins[:, None] + BLOCK)
    # Tokens that fill up the last block are no queries.
    full = full & (begins[:, None] + BLOCK <= length)
    if positions is None or first is None:
        mask_mod = _interval(visible_until)
    else:
        positions, first = positions.int().contiguous(), first.int().contiguous()
        mask_mod = _window(visible_until, positions, first)
        (lowest, highest), (early, late) = _extremes(positions), _extremes(first)
        seen = seen & (highest[:, None, :] >= early[:, :, None])
        full = full & (lowest[:, None, :] >= late[:, :, None])
    part = (seen & ~full) | (begins[None, :] == begins[:, None])
    return BlockMask.from_kv_blocks(
        *_listed(part), *_listed(full), BLOCK, mask_mod, seq_lengths=(length, length)
    )


def _extremes(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest of each block's numbers [B, L], as [B, N]."""
    missing = -numbers.shape[1] % BLOCK
    # The last number stands for those that are missing.
    filled = torch.cat([numbers, numbers[:, -1:].expand(-1, missing)], 1).unflatten(1, (-1, BLOCK))
    return filled.amin(-1), filled.amax(-1)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The number of the blocks of keys for each block of queries [B, 1, N], and the list of them.

    `blocks` is bool[B, N, N]. In the list [B, 1, N, N] those come first, in order.
    """
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


def _interval(visible_until: Tensor) -> MaskMod:
    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((k <= q) & (q < visible_until[b, k])) | (k == q)

    return visible


def _window(visible_until: Tensor, positions: Tensor, first: Tensor) -> MaskMod:
    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        near = positions[b, k] >= first[b, q]
        return ((k <= q) & (q < visible_until[b, k]) & near) | (k == q)

    return visible


def capped_scores(softcap: float) -> ScoreMod:
    """Limits scores to `softcap`, as Gemma 2 does."""

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


# Inside a compiled block with symbolic shapes, its factors would be symbols, which it refuses.
@torch.compiler.disable()
def attend_by_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scaling: float | None,
    score_mod: ScoreMod | None = None,
) -> Tensor:
    """Attention by FlexAttention: outputs [B, L, H, D].

    Args:
        query: [B, H, L, D].
        key: [B, G, L, D].
        value: [B, G, L, D].
        mask: Of `interval_block_mask`.
        scaling: The factor of the scores, D ** -0.5 by default.
        score_mod: What else is done to the scores.
    """
    attended = flex_attention(
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=mask,
        scale=1 / math.sqrt(query.shape[-1]) if scaling is None else scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended.transpose(1, 2).contiguous()
