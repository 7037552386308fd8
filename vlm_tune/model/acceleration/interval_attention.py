"""Attention of decoder rows whose tokens see intervals, block by block: nothing of [L, L] is kept for the backward pass.

A kernel of our own computes it in bf16 where there is one (`native`): scores are made, used and dropped inside a core's
cache. Elsewhere, and in other types, blocks of queries go through torch's matrix products (`block_attention`). In both,
keys that no query of a block sees are left out.

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
"""What transformers knows the attention by."""

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
"""Settings of a language model with which attention is something else."""


def _plain(config: Any) -> bool:
    """Whether attention is softmax(q k) v and nothing else."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"} and not any(
        getattr(config, name, None) for name in UNSUPPORTED
    )


def usable(decoder: Any) -> bool:
    """Whether a decoder of transformers that is on a CPU can attend by `attend`: its attention is that and nothing else."""
    config = decoder.config
    # A plan's model has shapes alone.
    if (
        next(decoder.parameters()).device.type not in ("cpu", "meta")
        or not decoder._supports_attention_backend
    ):
        return False
    return _plain(config) and config.get_text_config() is config


def _by_kernel(query: Tensor) -> bool:
    """Whether attention of a query [B, H, L, D] is the kernel's to compute."""
    return (
        query.dtype == torch.bfloat16
        and query.shape[-1] % 32 == 0
        and native.library(native.KERNELS) is not None
    )


@contextmanager
def attending(model: Any, name: str = NAME) -> Iterator[None]:
    """Within, a model of transformers attends by the function of that name, ours by default."""
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def attends(model: Any) -> bool:
    """Whether a model attends by `attend` now, and so takes where tokens end, int32[B, 1, 1, L], for its mask."""
    return model.config._attn_implementation == NAME


class Branches:
    """Branches of rows that grow by a token a call of the model: what each sees of its row, and its own tokens.

    `kept` are the keys and values [B, G, L, D] of every layer, `seen` bool[B, K, L] what the K branches see of them.
    """

    def __init__(self, kept: list[tuple[Tensor, Tensor]], seen: Tensor) -> None:
        self.kept = kept
        self.calls = 0
        self.seen = seen.contiguous()
        self.own: list[list[tuple[Tensor, Tensor]]] = [[] for _ in kept]

    def keep(self, places: Tensor) -> None:
        """Only the branches at `places` int64[B, K'] grow on."""
        rows = torch.arange(len(places), device=places.device)[:, None]
        self.seen = self.seen[rows, places]
        self.own = [
            [
                (key[rows, :, places].transpose(1, 2), value[rows, :, places].transpose(1, 2))
                for key, value in own
            ]
            for own in self.own
        ]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Outputs [B, K, H, D] of the newest tokens' query [B, H, K, D], key and value [B, G, K, D], layer by layer."""
        keys, values = self.kept[self.calls % len(self.kept)]
        own = self.own[self.calls % len(self.kept)]
        self.calls += 1
        own.append((key.clone(), value.clone()))
        if not _by_kernel(query):
            return attend_grown(query, keys, values, self.seen, own, scale)
        rows, heads, branches, width = query.shape
        query = _rows(query)
        out = query.new_empty(rows, branches, heads, width)
        grown = [each for pair in own for each in pair]
        shape = (ctypes.c_int64 * 7)(
            rows, heads, key.shape[1], keys.shape[2], width, branches, len(own)
        )
        native.kernels().grow_branches(
            shape,
            ctypes.c_float(scale),
            _strides(query, keys, values, *grown),
            *pointers(query, keys, values, self.seen),
            (ctypes.c_void_p * len(grown))(*(each.data_ptr() for each in grown)),
            *pointers(out),
        )
        return out


_kept: list[tuple[Tensor, Tensor]] | None = None
_growing: Branches | None = None
_runs = 0


def runs() -> int:
    """How often attention's forward pass has run in this process, by itself or within a kernel of whole layers."""
    return _runs


def count_run() -> None:
    """Attention's forward pass has run, within a kernel of whole layers."""
    global _runs
    _runs += 1


def is_generating() -> bool:
    """Whether what is attended to is kept, or branches grow by it."""
    return _kept is not None or _growing is not None


@contextmanager
def keeping() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within, the keys and values [B, G, L, D] of every layer that attends by `attend` are kept, in the list it gives.

    So a compiled block needs no cache among its arguments, and no second graph for one.
    """
    global _kept
    kept: list[tuple[Tensor, Tensor]] = []
    _kept = kept
    try:
        yield kept
    finally:
        _kept = None


@contextmanager
def growing(branches: Branches) -> Iterator[None]:
    """Within, a model that attends by `attend` is given the newest tokens of branches, and they attend as branches do."""
    global _growing
    _growing = branches
    try:
        yield
    finally:
        _growing = None


def _strides(*tensors: Tensor) -> Any:
    found = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    return (ctypes.c_int64 * len(found))(*found)


def _rows(tensor: Tensor) -> Tensor:
    """With the values of a head side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _shape(query: Tensor, key: Tensor) -> Any:
    rows, heads, length, width = query.shape
    groups = key.shape[1]
    return (ctypes.c_int64 * 5)(rows, heads, groups, length, width)


# A compiler's cache knows an operator by its name alone, so what it does is part of that.
PARTS = (Path(__file__), Path(block_attention.__file__))
KERNEL = hashlib.sha256(
    native.code(native.KERNELS) + b"".join(part.read_bytes() for part in PARTS)
).hexdigest()[:8]


def _outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the outputs [B, L, H, D] and fp32 logs [B, H, L] of a query [B, H, L, D]; blocks keep no logs."""
    rows, heads, length, width = query.shape
    logged = length if _by_kernel(query) else 0
    return query.new_empty(rows, length, heads, width), query.new_empty(
        rows, heads, logged, dtype=torch.float32
    )


def _gradients(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients of query as [B, L, H, D], and of key and value as [B, L, G, D]."""
    rows, heads, length, width = query.shape
    keys, values = (query.new_empty(rows, length, key.shape[1], width) for _ in range(2))
    return query.new_empty(rows, length, heads, width), keys, values


@torch.library.custom_op(f"vlm_tune::attend_{KERNEL}", mutates_args=())
def attend(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention outputs [B, L, H, D] of query [B, H, L, D], key and value [B, G, L, D], and the kernel's fp32 [B, H, L] logs of their sums.

    Query i sees key j where j <= i < ends[b, j] (int32[B, L]); one that sees none has zeros.
    """
    if _growing is not None:
        return _growing.attend(query, key, value, scale), _outputs(query)[1]
    query = _rows(query)
    key = _rows(key)
    value = _rows(value)
    ends = ends.contiguous()
    global _runs
    _runs += 1
    if _kept is not None:
        _kept.append((key.clone(), value.clone()))
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
    """The gradients of query as [B, L, H, D], and of key and value as [B, L, G, D], given that of the outputs [B, L, H, D]."""
    query = _rows(query)
    key = _rows(key)
    value = _rows(value)
    ends = ends.contiguous()
    gradient = _rows(gradient)
    if not _by_kernel(query):
        return attend_blocks_backward(gradient, query, key, value, ends, scale)
    found = _gradients(query, key)
    native.kernels().attend_backward(
        _shape(query, key),
        ctypes.c_float(scale),
        _strides(gradient.transpose(1, 2), query, key, value, out.transpose(1, 2), *found),
        *pointers(gradient, query, key, value, None, None, out, logs, ends, *found),
    )
    return found


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
    found = attend_backward(gradient, query, key, value, out, logs, ends, ctx.scale)
    return *(each.transpose(1, 2) for each in found), None, None


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
    """As transformers calls it, with int32[B, 1, 1, L] for a mask."""
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    dtype = compute_dtype(query)
    query, key, value = (each.to(dtype) for each in (query, key, value))
    # Values are often a view of all that q, k and v are computed in, which would be kept with them.
    value = value.contiguous()
    return attend(query, key, value, attention_mask[:, 0, 0], scale)[0], None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
