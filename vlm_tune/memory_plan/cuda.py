"""Memory that a step takes on a GPU beyond its tensors, and the rules of autocast there.

None of it needs a GPU: a plan gives the same figures on any machine.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CONTEXT = 600_000_000
"""Bytes that the CUDA context and the kernels loaded into it take (an estimate)."""

COLLECTIVES = 350_000_000
"""Bytes of NCCL's buffers with its default channels of 4 MiB (an estimate, not measured)."""

HANDLES = 2
"""cuBLAS handles with a workspace each: the forward pass's thread and the backward pass's."""

WORKSPACE = ":4096:8"
"""PyTorch's default on GPUs from Hopper on; earlier ones have 8.5 MB."""

WIDENED = frozenset(
    [
        "acos",
        "asin",
        "cosh",
        "erfinv",
        "exp",
        "expm1",
        "log",
        "log10",
        "log2",
        "log1p",
        "reciprocal",
        "rsqrt",
        "sinh",
        "tan",
        "pow",
        "softplus",
        "layer_norm",
        "native_layer_norm",
        "rms_norm",
        "group_norm",
        "frobenius_norm",
        "nuclear_norm",
        "cosine_similarity",
        "poisson_nll_loss",
        "cosine_embedding_loss",
        "nll_loss",
        "nll_loss2d",
        "hinge_embedding_loss",
        "kl_div",
        "l1_loss",
        "smooth_l1_loss",
        "huber_loss",
        "mse_loss",
        "margin_ranking_loss",
        "multilabel_margin_loss",
        "soft_margin_loss",
        "triplet_margin_loss",
        "multi_margin_loss",
        "binary_cross_entropy_with_logits",
        "dist",
        "pdist",
        "cdist",
        "renorm",
        "logsumexp",
        "interpolate",
        "cross_entropy",
        "normalize",
        "norm",
        "linalg_vector_norm",
        "linalg_matrix_norm",
        "__rdiv__",
        "__rtruediv__",
        "__rpow__",
        "__pow__",
    ]
)
"""Functions whose 16-bit inputs CUDA's autocast casts to fp32 (`AT_FORALL_FP32` of torch), and
those made of them."""

SUMMED = frozenset(["prod", "softmax", "log_softmax", "cumprod", "cumsum", "sum"])
"""Functions that CUDA's autocast gives an fp32 output (`AT_FORALL_FP32_SET_OPT_DTYPE`)."""

HALVES = (torch.bfloat16, torch.float16)


def workspaces() -> int:
    """Bytes of cuBLAS's workspaces by CUBLAS_WORKSPACE_CONFIG, `:KiB:count` once or several times.

    PyTorch's default where the variable is not set or is not of that form.
    """
    for text in (os.environ.get("CUBLAS_WORKSPACE_CONFIG", WORKSPACE), WORKSPACE):
        numbers = text.lstrip(":").split(":")
        if len(numbers) % 2 == 0 and all(number.isdecimal() for number in numbers):
            sizes = [int(number) for number in numbers]
            return HANDLES * 1024 * sum(map(math.prod, zip(sizes[::2], sizes[1::2], strict=True)))
    raise AssertionError("the default can be read")


class _Widening(TorchFunctionMode):
    """Casts as CUDA's autocast where a CPU's, which is active around it, leaves 16 bits."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if torch.is_autocast_enabled("cpu"):
            if name in WIDENED:
                args = tuple(map(_widened, args))
                kwargs = {key: _widened(value) for key, value in kwargs.items()}
            elif name in SUMMED and not _has_dtype(args, kwargs):
                args = tuple(map(_widened, args))
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in HALVES else value


def _has_dtype(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    values = (*args, *kwargs.values())
    return any(isinstance(value, torch.dtype) for value in values)


@contextmanager
def cuda_autocast(dtype: torch.dtype) -> Iterator[None]:
    """Autocast by CUDA's rules for tensors on the CPU; none for float32.

    A CPU's autocast has the same list of products in 16 bits. CUDA's also runs norms, sums and
    losses in fp32, so what they save is wider.
    """
    if dtype == torch.float32:
        yield
        return
    with torch.autocast("cpu", dtype=dtype), _Widening():
        yield


def recomputed() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The contexts of a checkpointed block's first pass and of its second (`context_fn`).

    Within a backward pass modes are off, so the second pass needs the rules of its own.
    """
    return nullcontext(), _Widening()
