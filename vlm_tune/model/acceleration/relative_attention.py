"""Attention of encoder-decoders with relative positions (T5) on CUDA, by FlexAttention.

What a pair's distance adds to its score is looked up as the score is computed. By masks, sums of
these biases and a mask are written for every row, head and layer: [B, H, L, L].

Shapes: B rows, H heads, L queries, S keys, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from vlm_tune.compat import (
    attention_name,
    eager_attention,
    register_attention,
    sdpa_attention,
    set_attention,
    supports_flex,
)
from vlm_tune.model.acceleration import flex_attention
from vlm_tune.model.acceleration.flex_attention import BLOCK, WIDTHS, ScoreMod, attend_by_flex
from vlm_tune.model.language.seq2seq_attention import Seq2SeqAttention

NAMES = {"eager": "vlm_tune_relative_eager", "sdpa": "vlm_tune_relative_sdpa"}
"""Our names of the attention by that of transformers which other masks go by."""


FAMILY = ("t5", "mt5", "umt5")
"""Model types whose biases depend on the distance of key and query alone."""


def relative_reason(model: Any) -> str | None:
    """The reason why FlexAttention does not compute an encoder-decoder's attention, or None."""
    if model.config.model_type not in FAMILY:
        return "its attention is not T5's"
    if not supports_flex(model):
        return "transformers has none for it"
    if attention_name(model) not in (*NAMES, *NAMES.values()):
        return f"it attends by {attention_name(model)}"
    width = model.config.d_kv
    if not WIDTHS[0] <= width <= WIDTHS[1]:
        return f"heads are {width} wide, and not {WIDTHS[0]} to {WIDTHS[1]}"
    rate = getattr(model.config, "dropout_rate", 0.0)
    return f"its attention drops weights (dropout_rate: {rate:g} in its config)" if rate else None


def passing_reason(device: torch.device) -> str | None:
    """The reason why FlexAttention does not compute this attention now on a device, or None."""
    if torch.are_deterministic_algorithms_enabled():
        # Many pairs of tokens add to each bias's gradient, in any order.
        return "its gradient of the biases is not deterministic"
    return flex_attention.device_reason(device)


class RelativeAttention(Seq2SeqAttention):
    """Attention by FlexAttention on CUDA; on other devices it is by masks.

    So it is where torch has to be deterministic.
    """

    def masks(
        self,
        row_mask: Tensor,
        samples: Tensor | None,
        label_samples: Tensor | None,
        targets: int,
        dtype: torch.dtype,
    ) -> tuple[Any, Any, Any]:
        if passing_reason(row_mask.device) is not None:
            return super().masks(row_mask, samples, label_samples, targets, dtype)
        one = row_mask.new_zeros((len(row_mask), targets), dtype=torch.int32)
        answers = one if label_samples is None else label_samples
        readers = one if samples is None else answers
        inputs = row_mask.int() - 1 if samples is None else samples
        return (
            _sample_mask(inputs, inputs),
            _sample_mask(readers, inputs),
            _sample_mask(answers, answers, causal=True),
        )


def _sample_mask(rows: Tensor, columns: Tensor, *, causal: bool = False) -> BlockMask:
    """The mask of `same_sample` for FlexAttention; `causal` leaves out later tokens.

    `rows` [B, L] and `columns` [B, S] are the queries' and keys' numbers of samples.
    """

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = rows[b, q] == columns[b, k]
        return same & (k <= q) if causal else same

    sizes = len(rows), None, rows.shape[1], columns.shape[1]
    return create_block_mask(visible, *sizes, device=rows.device, BLOCK_SIZE=BLOCK)


def _by_distance(position_bias: Tensor) -> ScoreMod:
    """Adds a bias [1, H, L, S] to scores, which depends on the distance of key and query alone."""
    queries = position_bias.shape[2]
    # Of the keys of the first query, and of the first key of the other queries.
    earlier, later = position_bias[0, :, 1:, 0].flip(1), position_bias[0, :, 0]
    bias = torch.cat([earlier, later], 1).contiguous()

    def biased(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + bias[h, k - q + (queries - 1)]

    return biased


def attend(
    fallback: Callable[..., tuple[Tensor, Tensor | None]],
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with transformers' signature: outputs [B, L, H, D], and None for the weights.

    Args:
        fallback: transformers' function for other masks.
        module: The attention module.
        query: [B, H, L, D].
        key: [B, H, S, D].
        value: [B, H, S, D].
        attention_mask: A mask of `RelativeAttention`, or any mask of transformers.
        scaling: The factor of the scores.
        position_bias: [1, H, L, S], added to scores.
        **options: Further arguments of transformers' function.
    """
    if not isinstance(attention_mask, BlockMask) or position_bias is None:
        options |= {"scaling": scaling, "position_bias": position_bias}
        return fallback(module, query, key, value, attention_mask, **options)
    score_mod = _by_distance(position_bias)
    return attend_by_flex(query, key, value, attention_mask, scaling, score_mod), None


def _attend_or_eager(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return attend(eager_attention(module), module, *args, **kwargs)


def _attend_or_sdpa(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return attend(sdpa_attention, module, *args, **kwargs)


def use_relative(model: Any) -> None:
    """Registers the attention with transformers and sets it for a model's encoder and decoder."""
    register_attention(NAMES["eager"], _attend_or_eager, masks_of="eager")
    register_attention(NAMES["sdpa"], _attend_or_sdpa, masks_of="sdpa")
    for config in _configs(model):
        name = attention_name(config)
        set_attention(config.config, NAMES.get(name, name))


def leave_relative(model: Any) -> None:
    """Sets transformers' attention again."""
    before = {name: original for original, name in NAMES.items()}
    for config in _configs(model):
        name = attention_name(config)
        set_attention(config.config, before.get(name, name))


def _configs(model: Any) -> Iterator[Any]:
    """Yields the modules with a config of their own: the model, its encoder and its decoder."""
    yield from (model, model.get_encoder(), model.get_decoder())
