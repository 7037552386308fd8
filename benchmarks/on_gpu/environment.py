"""Versions, the GEMM rate, and which attention backend runs for which mask."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.on_gpu.measuring import Clock, device_type, memory_gb, note_gemm
from benchmarks.on_gpu.report import Report

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "trl",
    "bitsandbytes",
    "liger-kernel",
    "triton",
    "datasets",
    "timm",
    "open_clip_torch",
    "pydantic",
)
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def environment(report: Report) -> None:
    """Reports what the figures depend on."""
    report.figure("versions", {"python": platform.python_version(), **versions()})
    report.figure("device", device())
    note_gemm(report)
    report.figure("attention_ms", dict(attention(report.tiny)))


def versions() -> dict[str, str]:
    """The versions of the packages that are there."""
    installed: dict[str, str] = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def device() -> dict[str, Any]:
    """The device's name, memory, driver and libraries."""
    if device_type() == "cpu":
        return {"name": platform.processor() or platform.machine()}
    asks = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv"]
    try:
        smi = subprocess.run(asks, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        smi = str(error)
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_gb": memory_gb(),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "nvidia_smi": smi,
    }


def attention(tiny: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each mask with the milliseconds of every backend that takes it, forward and backward.

    A backend that does not take it has the reason instead.
    """
    length, heads, width = (32, 2, 16) if tiny else (2048, 32, 128)
    shape = (1 if tiny else 4, heads, length, width)
    q, k, v = (
        torch.randn(shape, device=device_type(), dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    causal = torch.ones(length, length, device=q.device, dtype=torch.bool).tril()
    masks: dict[str, dict[str, Any]] = {
        "none": {},
        "is_causal": {"is_causal": True},
        "bool": {"attn_mask": causal.expand(shape[0], 1, -1, -1)},
        "bias": {"attn_mask": torch.zeros(1, heads, length, length, device=q.device).to(q.dtype)},
    }
    for name, options in masks.items():

        def step(options: dict[str, Any] = options) -> None:
            scaled_dot_product_attention(q, k, v, **options).sum().backward()

        by_backend: dict[str, Any] = {}
        for backend, kind in BACKENDS.items():
            with sdpa_kernel(kind):
                by_backend[backend] = _milliseconds(step)
        by_backend["chosen"] = _milliseconds(step)
        yield name, by_backend
    yield "intervals by FlexAttention", {"flex": _flex(q, k, v)}


def _flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float | str:
    if device_type() == "cpu":
        return "has no backward pass on a CPU"
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = q.shape[2]
    visible_until = torch.full((length,), length, device=q.device)
    visible_until[length // 2 : 3 * length // 4] = 3 * length // 4

    def visible(b: Any, h: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (query < visible_until[key])

    mask = create_block_mask(visible, None, None, length, length, device=q.device)
    compiled: Any = torch.compile(flex_attention)
    return _milliseconds(lambda: compiled(q, k, v, block_mask=mask).sum().backward())


def _milliseconds(step: Callable[[], object], repeats: int = 5) -> float | str:
    """The median of some calls after one; or why there is none, in a few words."""
    try:
        step()
        clock = Clock()
        clock.mark()
        for _ in range(repeats):
            step()
            clock.mark()
        return round(sorted(clock.laps())[repeats // 2], 4)
    except RuntimeError as error:
        return str(error).strip().splitlines()[0][:80]
