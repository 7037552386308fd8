"""The attention kernel with rotary embedding inside, against fp32 by torch.

It works on a merged buffer of queries, keys and values.
"""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softmax

from vlm_tune.kernels.cpu import native
from vlm_tune.kernels.cpu.native import pointers

needs_kernel = pytest.mark.usefixtures("kernels")


def parts(buffer: Tensor, heads: int, groups: int, width: int) -> list[Tensor]:
    """Views [B, L, H, D] and two [B, L, G, D] of [B, L, (H + 2G) * D]."""
    split = buffer.split([heads * width, groups * width, groups * width], -1)
    return [each.unflatten(-1, (-1, width)) for each in split]


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = states.chunk(2, -1)
    return states * cos[:, :, None] + torch.cat((-right, left), -1) * sin[:, :, None]


def reference(
    buffer: Tensor, cos: Tensor, sin: Tensor, ends: Tensor, heads: int, groups: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs [B, L, H, D] and the logs of the sums [B, H, L]."""
    query, key, value = parts(buffer, heads, groups, cos.shape[-1])
    query, key = rotated(query, cos, sin), rotated(key, cos, sin)
    query, key, value = (
        each.transpose(1, 2).repeat_interleave(heads // each.shape[2], 1)
        for each in (query, key, value)
    )
    places = torch.arange(ends.shape[1])
    seen = (places <= places[:, None]) & (places[:, None] < ends[:, None, None])
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    return (softmax(scores.clamp(min=-1e30), -1) * seen @ value).transpose(1, 2), scores.logsumexp(
        -1
    )


def strides(by_head: list[Tensor], by_token: list[Tensor]) -> Any:
    """Strides of tensors [B, L, heads, D]: by row, head and token, and by row, token and head."""
    flat = [each.stride(place) for each in by_head for place in (0, 2, 1)] + [
        each.stride(place) for each in by_token for place in range(3)
    ]
    return (ctypes.c_int64 * len(flat))(*flat)


@needs_kernel
@pytest.mark.parametrize(
    ("rows", "heads", "groups", "length", "width"),
    [(3, 9, 3, 133, 64), (1, 4, 1, 37, 32), (3, 2, 2, 16, 128), (1, 10, 2, 611, 96)],
)
def test_rotated_parts_of_a_merged_buffer(
    rows: int, heads: int, groups: int, length: int, width: int
) -> None:
    library, generator = native.library(native.KERNELS), torch.Generator().manual_seed(length)
    assert library is not None
    buffer = torch.randn(rows, length, (heads + 2 * groups) * width, generator=generator).bfloat16()
    # Halves of an angle's cos and sin that are not alike show which one is taken.
    angles = 6 * torch.rand(rows, length, width, generator=generator)
    cos, sin = angles.cos().bfloat16(), (angles + 0.5).sin().bfloat16()
    ends = torch.full((rows, length), length, dtype=torch.int32)
    for start in range(length // 3, length, 11):
        ends[:, start : start + 11] = min(start + 11, length)
    # Three tokens that nobody sees, and that see nothing, at the end of the last row.
    ends[-1] = torch.where(torch.arange(length) < length - 3, ends[-1].clamp(max=length - 3), 0)
    flow, scale = (
        torch.randn(rows, length, heads, width, generator=generator).bfloat16(),
        width**-0.5,
    )
    shape, given = (
        (ctypes.c_int64 * 5)(rows, heads, groups, length, width),
        parts(buffer, heads, groups, width),
    )
    out, logs = torch.full_like(flow, torch.nan), torch.full((rows, heads, length), torch.nan)
    library.attend(
        shape,
        ctypes.c_float(scale),
        strides(given, []),
        *pointers(*given, cos, sin, ends, out, logs),
    )
    merged = torch.full_like(buffer, torch.nan)
    gradients = parts(merged, heads, groups, width)
    library.attend_backward(
        shape,
        ctypes.c_float(scale),
        strides([flow, *given, out], gradients),
        *pointers(flow, *given, cos, sin, out, logs, ends, *gradients),
    )
    true_buffer = buffer.float().requires_grad_()
    true_out, true_logs = reference(
        true_buffer, cos.float(), sin.float(), ends, heads, groups, scale
    )
    true_out.backward(flow.float())
    assert true_buffer.grad is not None
    true_out, true_logs = true_out.detach(), true_logs.detach()
    assert float((out - true_out).norm()) < 6e-3 * float(true_out.norm())
    seen = true_logs.isfinite()
    assert (
        bool((logs[~seen] == torch.inf).all())
        and float((logs - true_logs)[seen].abs().max()) < 0.05
    )
    for mine, true in zip(gradients, parts(true_buffer.grad, heads, groups, width), strict=True):
        assert float((mine - true).norm()) < 1e-2 * float(true.norm())


@needs_kernel
def test_rotation_inside_is_rotation_before() -> None:
    """The same numbers, with and without, where what is rotated is rounded once."""
    library, generator = native.library(native.KERNELS), torch.Generator().manual_seed(0)
    assert library is not None
    rows, heads, length, width = 3, 3, 45, 64
    given = [
        torch.randn(rows, length, heads, width, generator=generator).bfloat16() for _ in range(3)
    ]
    cos, sin = (torch.rand(rows, length, width, generator=generator).bfloat16() for _ in range(2))
    turned = [
        rotated(each.double(), cos.double(), sin.double()).bfloat16() for each in given[:2]
    ] + given[2:]
    ends, shape = (
        torch.full((rows, length), length, dtype=torch.int32),
        (ctypes.c_int64 * 5)(rows, heads, heads, length, width),
    )
    outs = [torch.empty_like(given[0]) for _ in range(2)]
    logs = torch.empty(rows, heads, length)
    library.attend(
        shape,
        ctypes.c_float(0.1),
        strides(given, []),
        *pointers(*given, cos, sin, ends, outs[0], logs),
    )
    library.attend(
        shape,
        ctypes.c_float(0.1),
        strides(turned, []),
        *pointers(*turned, None, None, ends, outs[1], logs),
    )
    assert float((outs[0] - outs[1]).float().norm()) < 1e-3 * float(outs[1].float().norm())
