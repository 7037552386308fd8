"""Attention of decoders in which every key is visible to an interval of queries.

It is computed block by block, so nothing of size [L, L] is saved for the backward pass. In bf16 the
project's own kernel computes it where there is one (`native`): scores are computed, used and
dropped inside a core's cache. On other devices and in other types, blocks of queries go through
torch's matrix products (`block_attention`). Both skip keys that no query of a block sees.

Shapes: B rows, H query heads, G key heads, L tokens, D head width.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlm_tune.kernels import block_attention
from vlm_tune.kernels.block_attention import attend_blocks, attend_blocks_backward, attend_grown
from vlm_tune.kernels.cpu import native
from vlm_tune.kernels.cpu.native import pointers
from vlm_tune.model.acceleration.lora_layers import compute_dtype

NAME = "vlm_tune_tree"
"""The name under which the attention is registered with transformers."""

UNSUPPORTED = (
    "sliding_window",
    "attn_logit_softcapping",
    "attention_dropout",
    "attn_pdrop",
    "kv_lora_rank",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "alibi",
)
"""Settings of a language model with which its attention is not what `attend` computes."""


def _plain(config: Any) -> bool:
    """Whether attention is softmax(q k) v and nothing else in all layers."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"} and not any(
        getattr(config, name, None) for name in UNSUPPORTED
    )


def usable(decoder: Any) -> bool:
    """Whether `attend` can replace the attention of a transformers decoder, which is on a CPU."""
    config = decoder.config
    # The model of a memory plan has shapes alone, on the meta device.
    if (
        next(decoder.parameters()).device.type not in ("cpu", "meta")
        or not decoder._supports_attention_backend
    ):
        return False
    return _plain(config) and config.get_text_config() is config


def _by_kernel(query: Tensor) -> bool:
    """Whether the kernel computes attention for this query [B, H, L, D]."""
    return (
        query.dtype == torch.bfloat16
        and query.shape[-1] % 32 == 0
        and native.library(native.KERNELS) is not None
    )


@contextmanager
def attending(model: Any, name: str = NAME) -> Iterator[None]:
    """Sets a transformers model's attention function within the context, `attend` by default."""
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def attends(model: Any) -> bool:
    """Whether a model's attention is now `attend`, whose mask is `ends` as int32[B, 1, 1, L]."""
    return model.config._attn_implementation == NAME


class Branches:
    """The KV cache of branches that continue shared rows, one token per decode step.

    Args:
        prefix: Keys and values [B, G, L, D] of the rows, for every layer.
        visible: bool[B, K, L], which tokens of its row each of the K branches sees.

    `grown` holds, for every layer, the keys and values [B, G, K, D] of each decode step.
    """

    def __init__(self, prefix: list[tuple[Tensor, Tensor]], visible: Tensor) -> None:
        self.prefix = prefix
        self.calls = 0
        self.visible = visible.contiguous()
        self.grown: list[list[tuple[Tensor, Tensor]]] = [[] for _ in prefix]

    def keep(self, places: Tensor) -> None:
        """Drops all branches but those at `places` int64[B, K']."""
        rows = torch.arange(len(places), device=places.device)[:, None]
        self.visible = self.visible[rows, places]
        self.grown = [
            [
                (key[rows, :, places].transpose(1, 2), value[rows, :, places].transpose(1, 2))
                for key, value in layer
            ]
            for layer in self.grown
        ]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention outputs [B, K, H, D] of a decode step in one layer.

        It must be called for the layers in order, and appends the step's keys and values.

        Args:
            query: The newest tokens' query [B, H, K, D].
            key: Their key [B, G, K, D].
            value: Their value [B, G, K, D].
            scale: What scores are multiplied by.
        """
        keys, values = self.prefix[self.calls % len(self.prefix)]
        steps = self.grown[self.calls % len(self.prefix)]
        self.calls += 1
        steps.append((key.clone(), value.clone()))
        if not _by_kernel(query):
            return attend_grown(query, keys, values, self.visible, steps, scale)
        rows, heads, branches, width = query.shape
        query = _rows(query)
        out = query.new_empty(rows, branches, heads, width)
        grown = [each for pair in steps for each in pair]
        shape = (ctypes.c_int64 * 7)(
            rows, heads, key.shape[1], keys.shape[2], width, branches, len(steps)
        )
        native.kernels().grow_branches(
            shape,
            ctypes.c_float(scale),
            _strides(query, keys, values, *grown),
            *pointers(query, keys, values, self.visible),
            (ctypes.c_void_p * len(grown))(*(each.data_ptr() for each in grown)),
            *pointers(out),
        )
        return out


_recorded: list[tuple[Tensor, Tensor]] | None = None
_growing: Branches | None = None
_runs = 0


def runs() -> int:
    """How often attention's forward pass has run in this process, alone or in a decoder layer."""
    return _runs


def count_run() -> None:
    """Counts a forward pass of attention that ran within the kernel of a decoder layer."""
    global _runs
    _runs += 1


def is_generating() -> bool:
    """Whether `attend` now records keys and values (`keeping`) or decodes branches (`growing`)."""
    return _recorded is not None or _growing is not None


@contextmanager
def keeping() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Records the keys and values [B, G, L, D] of every layer that attends by `attend`.

    The context gives the list that they are appended to. So a compiled block needs no cache among
    its arguments, and no second graph for one.
    """
    global _recorded
    layers: list[tuple[Tensor, Tensor]] = []
    _recorded = layers
    try:
        yield layers
    finally:
        _recorded = None


@contextmanager
def growing(branches: Branches) -> Iterator[None]:
    """Makes `attend` decode within the context: its input is the newest tokens of the branches."""
    global _growing
    _growing = branches
    try:
        yield
    finally:
        _growing = None


def _strides(*tensors: Tensor) -> Any:
    """The strides of 4-dimensional tensors but the last, as a C array."""
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    return (ctypes.c_int64 * len(strides))(*strides)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous in memory."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _shape(query: Tensor, key: Tensor) -> Any:
    rows, heads, length, width = query.shape
    groups = key.shape[1]
    return (ctypes.c_int64 * 5)(rows, heads, groups, length, width)


# A compiler's cache identifies an operator by its name alone, so the name has a hash of its code.
PARTS = (Path(__file__), Path(block_attention.__file__))
KERNEL = hashlib.sha256(
    native.code(native.KERNELS) + b"".join(part.read_bytes() for part in PARTS)
).hexdigest()[:8]


def _outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    """Empty outputs [B, L, H, D] and fp32 logsumexp [B, H, L] for a query [B, H, L, D].

    The logsumexp is [B, H, 0] where attention runs in blocks, which do not save it.
    """
    rows, heads, length, width = query.shape
    logged = length if _by_kernel(query) else 0
    return query.new_empty(rows, length, heads, width), query.new_empty(
        rows, heads, logged, dtype=torch.float32
    )


def _gradients(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty gradients of query as [B, L, H, D], and of key and value as [B, L, G, D]."""
    rows, heads, length, width = query.shape
    keys, values = (query.new_empty(rows, length, key.shape[1], width) for _ in range(2))
    return query.new_empty(rows, length, heads, width), keys, values


@torch.library.custom_op(f"vlm_tune::attend_{KERNEL}", mutates_args=())
def attend(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention in which query i sees key j where j <= i < ends[b, j].

    Args:
        query: [B, H, L, D].
        key: [B, G, L, D].
        value: [B, G, L, D].
        ends: int32[B, L], the first query after each key that no longer sees it.
        scale: What scores are multiplied by.

    Returns:
        Outputs [B, L, H, D], zeros for a query that sees no key, and the scores' fp32 logsumexp
        [B, H, L], by the kernel only (see `_outputs`).
    """
    if _growing is not None:
        return _growing.attend(query, key, value, scale), _outputs(query)[1]
    query = _rows(query)
    key = _rows(key)
    value = _rows(value)
    ends = ends.contiguous()
    global _runs
    _runs += 1
    if _recorded is not None:
        _recorded.append((key.clone(), value.clone()))
    if not _by_kernel(query):
        return attend_blocks(query, key, value, ends, scale), _outputs(query)[1]
    out, logs = _outputs(query)
    native.kernels().attend(
        _shape(query, key),
        ctypes.c_float(scale),
        _strides(query, key, value),
        *pointers(query, key, value, None, None, ends, out, logs),
    )
    return out, logs


@attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return _outputs(query)


@torch.library.custom_op(f"vlm_tune::attend_backward_{KERNEL}", mutates_args=())
def attend_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logs: Tensor,
    ends: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query as [B, L, H, D], and of key and value as [B, L, G, D].

    `gradient` is that of the outputs, [B, L, H, D]; `out` and `logs` are what `attend` returned.
    """
    query = _rows(query)
    key = _rows(key)
    value = _rows(value)
    ends = ends.contiguous()
    gradient = _rows(gradient)
    if not _by_kernel(query):
        return attend_blocks_backward(gradient, query, key, value, ends, scale)
    gradients = _gradients(query, key)
    native.kernels().attend_backward(
        _shape(query, key),
        ctypes.c_float(scale),
        _strides(gradient.transpose(1, 2), query, key, value, out.transpose(1, 2), *gradients),
        *pointers(gradient, query, key, value, None, None, out, logs, ends, *gradients),
    )
    return gradients


@attend_backward.register_fake
def _(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logs: Tensor,
    ends: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(query, key)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ends, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, ends)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, out, logs, ends = ctx.saved_tensors
    gradients = attend_backward(gradient, query, key, value, out, logs, ends, ctx.scale)
    return *(each.transpose(1, 2) for each in gradients), None, None


attend.register_autograd(_backward, setup_context=_save)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """`attend` with transformers' signature; the mask is `ends` as int32[B, 1, 1, L]."""
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    dtype = compute_dtype(query)
    query, key, value = (each.to(dtype) for each in (query, key, value))
    # Values are often a view into the merged output of q, k and v, all of which would be saved.
    value = value.contiguous()
    return attend(query, key, value, attention_mask[:, 0, 0], scale)[0], None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
