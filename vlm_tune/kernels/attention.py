"""The operator of attention in which every key is visible to an interval of queries.

It is computed block by block, so nothing of size [L, L] is saved for the backward pass. In bf16 on
a CPU the project's own kernel computes it where there is one (`native`): scores are computed, used
and dropped inside a core's cache. Otherwise blocks of queries go through torch's matrix products
(`reference_attention`). Both skip keys that no query of a block sees.

Shapes: B rows, K branches of a row, H query heads, G key heads, L tokens, D head width.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from vlm_tune.kernels.cpu import native
from vlm_tune.kernels.cpu.native import pointers
from vlm_tune.kernels.devices import check_devices
from vlm_tune.kernels.kv_cache import KVCache, Layer
from vlm_tune.kernels.operator import operator
from vlm_tune.kernels.reference_attention import (
    attend_blocks,
    attend_blocks_backward,
    attend_grown,
)


def _operands_reason(dtype: torch.dtype, device: torch.device, width: int) -> str | None:
    """The reason why the kernel is not for such heads, whether it is there or not."""
    if device.type != "cpu":
        return f"the attention kernel is for CPUs, not {device.type}"
    if dtype != torch.bfloat16:
        return f"the attention kernel computes in bf16, not {dtype}"
    if width % 32:
        return f"heads are {width} wide, which is no multiple of 32"
    return None


def unsupported_reason(dtype: torch.dtype, device: torch.device, width: int) -> str | None:
    """The reason why the kernel does not compute heads of D = `width`; None if it does."""
    reason = _operands_reason(dtype, device, width)
    # It computes rows of keys, so it has no limit of threads.
    if reason is not None or native.library(native.KERNELS) is not None:
        return reason
    return native.unavailable_reason()


def _by_kernel(query: Tensor) -> bool:
    """Whether the kernel computes attention for this query [B, H, L, D]."""
    return (
        _operands_reason(query.dtype, query.device, query.shape[-1]) is None
        and native.library(native.KERNELS) is not None
    )


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


@operator("interval_attention")
def interval_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible_until: Tensor,
    scale: float,
    kv_cache: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention in which query i sees key j where j <= i < visible_until[b, j].

    Args:
        query: [B, H, L, D].
        key: [B, G, L, D].
        value: [B, G, L, D].
        visible_until: int32[B, L], the first query after each key that no longer sees it.
        scale: The factor of the scores.
        kv_cache: The handle of a `KVCache`, for generation. In its prefill it takes the keys and
            values. After that L is K, the newest tokens of its branches, which see what the cache
            says, whatever `visible_until` is.

    Returns:
        Outputs [B, L, H, D], zeros for a query that sees no key, and the scores' fp32 logsumexp
        [B, H, L], by the kernel only (see `_outputs`).

    Raises:
        ValueError: The tensors are on several devices.
        TypeError: `visible_until` is of another type.
    """
    check_devices("interval_attention", (query, key, value, visible_until))
    if visible_until.dtype != torch.int32:
        raise TypeError(f"visible_until is int32, got {visible_until.dtype}")
    by_kernel = _by_kernel(query)
    if kv_cache is not None:
        cache = KVCache.of(kv_cache)
        if cache.visible is not None:
            decode = _decode_by_kernel if by_kernel else attend_grown
            rows, steps = cache.decode(key, value)
            return decode(query, *rows, cache.visible, steps, scale), _outputs(query)[1]
        cache.prefill(key, value)
    query = _rows(query)
    key = _rows(key)
    value = _rows(value)
    visible_until = visible_until.contiguous()
    out, logs = _outputs(query)
    if not by_kernel:
        return attend_blocks(query, key, value, visible_until, scale), logs
    native.kernels().attend(
        _shape(query, key),
        ctypes.c_float(scale),
        _strides(query, key, value),
        *pointers(query, key, value, None, None, visible_until, out, logs),
    )
    return out, logs


def _decode_by_kernel(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    steps: list[Layer],
    scale: float,
) -> Tensor:
    """Outputs [B, K, H, D] of a decode step, as `attend_grown`."""
    rows, heads, branches, width = query.shape
    query = _rows(query)
    out = query.new_empty(rows, branches, heads, width)
    grown = [each for pair in steps for each in pair]
    shape = (ctypes.c_int64 * 7)(
        rows, heads, keys.shape[1], keys.shape[2], width, branches, len(steps)
    )
    native.kernels().grow_branches(
        shape,
        ctypes.c_float(scale),
        _strides(query, keys, values, *grown),
        *pointers(query, keys, values, visible),
        (ctypes.c_void_p * len(grown))(*(each.data_ptr() for each in grown)),
        *pointers(out),
    )
    return out


@interval_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible_until: Tensor,
    scale: float,
    kv_cache: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_devices("interval_attention", (query, key, value, visible_until))
    return _outputs(query)


@operator("interval_attention_backward")
def interval_attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logs: Tensor,
    visible_until: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query as [B, L, H, D], and of key and value as [B, L, G, D].

    `gradient` is that of the outputs [B, L, H, D]; `out` and `logs` are what
    `interval_attention` returned.
    """
    query = _rows(query)
    key = _rows(key)
    value = _rows(value)
    visible_until = visible_until.contiguous()
    gradient = _rows(gradient)
    if not _by_kernel(query):
        return attend_blocks_backward(gradient, query, key, value, visible_until, scale)
    gradients = _gradients(query, key)
    native.kernels().attend_backward(
        _shape(query, key),
        ctypes.c_float(scale),
        _strides(gradient.transpose(1, 2), query, key, value, out.transpose(1, 2), *gradients),
        *pointers(gradient, query, key, value, None, None, out, logs, visible_until, *gradients),
    )
    return gradients


@interval_attention_backward.register_fake
def _(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logs: Tensor,
    visible_until: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(query, key)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, visible_until, ctx.scale, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, visible_until)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, out, logs, visible_until = ctx.saved_tensors
    gradients = interval_attention_backward(
        gradient, query, key, value, out, logs, visible_until, ctx.scale
    )
    return *(each.transpose(1, 2) for each in gradients), None, None, None


interval_attention.register_gradient(_backward, _save)
