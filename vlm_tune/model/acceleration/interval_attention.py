"""Attention of decoders by the operator `interval_attention`, in training and in generation.

A mask of int32 [B, 1, 1, L] says where tokens stop being seen, and goes by the operator. Masks for
CUDA are those of `flex_attention`. With any other mask, attention is the function of transformers
that the model had.

Shapes: B rows, K branches of a row, H query heads, G key heads, L tokens, D head width, E width.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from vlm_tune.compat import (
    attention_name,
    eager_attention,
    register_attention,
    sdpa_attention,
    supports_attention_functions,
)
from vlm_tune.kernels.attention import interval_attention
from vlm_tune.kernels.kv_cache import KVCache
from vlm_tune.model.acceleration.flex_attention import (
    attend_by_flex,
    capped_scores,
    is_causal_mark,
)
from vlm_tune.model.acceleration.lora_layers import compute_dtype
from vlm_tune.model.language.attention import MaskedAttention, Prefill
from vlm_tune.model.language.masks import Blocks

NAMES = {"eager": "vlm_tune_eager", "sdpa": "vlm_tune_sdpa"}
"""The names under which the attention is registered with transformers.

The keys are the functions of transformers that compute it where the mask is not one of intervals.
"""

ON_CUDA = {"eager": "vlm_tune_cuda_eager", "sdpa": "vlm_tune_cuda_sdpa"}
"""The names for models whose attention the operator does not compute, and FlexAttention may."""

CACHE = "branch_cache"
"""The keyword by which the handle of a KV cache reaches the attention through a model's layers."""

OTHER_SCORES = ("softcap", "s_aux", "position_bias")
"""Arguments of transformers' attention functions that change scores, which sdpa may not take."""

UNSUPPORTED = (
    "sliding_window",
    "attn_logit_softcapping",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "kv_lora_rank",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "alibi",
)
"""Settings of a language model with which its attention is not what the operator computes."""


def interface_reason(model: Any) -> str | None:
    """The reason why a decoder can't call the attention of this package; None if it can.

    `model` is the transformers model.
    """
    config = model.config
    if not supports_attention_functions(model):
        return "its attention is not one of transformers' attention functions"
    if attention_name(model) not in (*NAMES, *NAMES.values(), *ON_CUDA.values()):
        return f"its attention is {attention_name(model)}, neither of {' and '.join(NAMES)}"
    if config.get_text_config() is not config:
        return "the language model is a part of a larger model's config"
    parameters = inspect.signature(model.base_model.forward).parameters
    if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return "its layers take no further arguments"
    if "position_ids" not in parameters:
        return "it takes no positions"
    return None


def unsupported_reason(model: Any) -> str | None:
    """The reason why a decoder's attention can't go by the operator; None if it can.

    `model` is the transformers model.
    """
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"its layers attend in other ways ({', '.join(sorted(kinds))})"
    for name in UNSUPPORTED:
        if getattr(config, name, None):
            return f"its config has {name}"
    return interface_reason(model)


class IntervalAttention(MaskedAttention):
    """Attention by the operator where rows are on a CPU; on other devices it is `elsewhere`."""

    def __init__(self, elsewhere: MaskedAttention) -> None:
        self.elsewhere = elsewhere

    def by_intervals(self, model: Any) -> bool:
        return self._applies(model, next(model.parameters()).device)

    def _applies(self, model: Any, device: torch.device) -> bool:
        # The model of a memory plan has shapes alone, on the meta device. Another attention
        # function may have been set since.
        return device.type in ("cpu", "meta") and attention_name(model) in NAMES.values()

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
        # Rows may be on another device than the weights, which FSDP can keep on the CPU.
        if blocks is not None or not self._applies(model, row_mask.device):
            return self.elsewhere.mask(
                model,
                row_mask,
                visible_until,
                positions,
                dtype,
                length,
                joinable=joinable,
                blocks=blocks,
            )
        if visible_until is None:
            visible_until = torch.where(row_mask, row_mask.shape[1], 0)
        return visible_until.int()[:, None, None]

    def prefill(
        self,
        model: Any,
        body: Any,
        embeds: Tensor,
        visible_until: Tensor,
        positions: Tensor,
        visible: Tensor,
        steps: int,
        blocks: Blocks | None = None,
    ) -> Prefill:
        if blocks is None and self._applies(model, embeds.device):
            rows = IntervalPrefill(body, embeds, visible_until, positions)
            if rows.cache.rows:
                rows.cache.branch(visible)
                return rows
            # The model's layers do not pass the cache on to their attention, as Nemotron's.
        return self.elsewhere.prefill(
            model, body, embeds, visible_until, positions, visible, steps, blocks
        )


class IntervalPrefill:
    """A prefill by the operator. Its KV cache is passed to the layers by its handle."""

    def __init__(self, body: Any, embeds: Tensor, visible_until: Tensor, positions: Tensor) -> None:
        self.body = body
        self.cache = KVCache()
        self.hidden = self._run(embeds, visible_until, positions)

    def step(self, embeds: Tensor, positions: Tensor) -> Tensor:
        """A decode step, see `Prefill`."""
        return self._run(embeds, torch.zeros_like(positions), positions)

    def select(self, places: Tensor) -> None:
        """Drops all branches but those at `places` int64[B, K']."""
        self.cache.select(places)

    def _run(self, embeds: Tensor, visible_until: Tensor, positions: Tensor) -> Tensor:
        return self.body(
            inputs_embeds=embeds,
            attention_mask=visible_until.int()[:, None, None],
            position_ids=positions,
            use_cache=False,
            **{CACHE: self.cache.handle},
        ).last_hidden_state


def is_interval_mask(mask: Any) -> bool:
    """Whether a mask says where tokens stop being seen, and so goes by the operator."""
    return isinstance(mask, Tensor) and mask.dtype == torch.int32


def attend(
    fallback: Callable[..., tuple[Tensor, Tensor | None]],
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float | None = None,
    branch_cache: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with transformers' signature: outputs [B, L, H, D], and None for the weights.

    Args:
        fallback: transformers' function for other masks.
        module: The attention module.
        query: [B, H, L, D].
        key: [B, G, L, D].
        value: [B, G, L, D].
        attention_mask: int32[B, 1, 1, L] for the operator, a mask of `flex_attention` for CUDA, or
            any mask of transformers.
        scaling: The factor of the scores, D ** -0.5 by default.
        branch_cache: The handle of a `KVCache`.
        **options: Further arguments of transformers' function.
    """
    if is_causal_mark(attention_mask):
        options["is_causal"] = True
        return sdpa_attention(module, query, key, value, None, scaling=scaling, **options)
    if not isinstance(attention_mask, BlockMask) and not is_interval_mask(attention_mask):
        if query.shape[2] == 1 and not any(options.get(name) is not None for name in OTHER_SCORES):
            # In a decode step it attends by groups of heads, where the eager function would copy
            # keys and values for every head.
            fallback = sdpa_attention
        return fallback(module, query, key, value, attention_mask, scaling=scaling, **options)
    dtype = compute_dtype(query)
    query, key, value = (each.to(dtype) for each in (query, key, value))
    if isinstance(attention_mask, BlockMask):
        softcap = options.get("softcap")
        score_mod = None if softcap is None else capped_scores(softcap)
        return attend_by_flex(query, key, value, attention_mask, scaling, score_mod), None
    assert attention_mask is not None
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    # Values are often a view into the merged output of q, k and v, all of which would be saved.
    value = value.contiguous()
    visible_until = attention_mask[:, 0, 0]
    return interval_attention(query, key, value, visible_until, scale, branch_cache)[0], None


def _attend_or_eager(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return attend(eager_attention(module), module, *args, **kwargs)


def _attend_or_sdpa(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return attend(sdpa_attention, module, *args, **kwargs)


def register() -> None:
    """Registers the attention with transformers, under `NAMES` and `ON_CUDA`."""
    for names in (NAMES, ON_CUDA):
        register_attention(names["eager"], _attend_or_eager, masks_of="eager")
        register_attention(names["sdpa"], _attend_or_sdpa, masks_of="sdpa")
