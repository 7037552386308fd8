"""The environment that a run's numbers depend on besides its recipe.

Versions of libraries and drivers, device, threads, processes, engine.
"""

from __future__ import annotations

import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.cuda import nccl

from vlm_tune.config.engine import AnyEngine
from vlm_tune.kernels.cpu.native import kernel_status

DRIVER = Path("/proc/driver/nvidia/version")
"""File in which NVIDIA's driver for Linux tells its version."""

LIBRARIES = ("vlm_tune", "torch", "transformers", "peft", "accelerate")


def environment(accelerator: Accelerator, engine: AnyEngine) -> dict[str, Any]:
    """The values by name; runs with different values may round differently.

    Raises `RecipeError` if $VLM_TUNE_KERNELS has an unknown value or one that this machine does not
    support.
    """
    device = accelerator.device
    kernels = kernel_status()
    return {
        **{name: version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability(),
        **(gpu_facts(device) if device.type == "cuda" else {"kernels": kernels.mode}),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "engine": engine.model_dump(mode="json"),
    }


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """Facts of a CUDA device and of what drives it.

    Compute capability, memory in MB (10^6 bytes), number of visible GPUs, and versions of the
    driver, CUDA, cuDNN and NCCL, None where one is unknown or missing.
    """
    properties = torch.cuda.get_device_properties(device)
    # Only a build with NCCL can tell its version.
    of_nccl = nccl.version() if torch.distributed.is_nccl_available() else None
    return {
        "capability": f"{properties.major}.{properties.minor}",
        "device_memory_mb": properties.total_memory // 1_000_000,
        "gpus": torch.cuda.device_count(),
        "driver": _driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": None if of_nccl is None else ".".join(map(str, of_nccl)),
    }


def _driver_version() -> str | None:
    """The version of NVIDIA's kernel driver; None where the system does not tell it."""
    try:
        text = DRIVER.read_text()
    except OSError:
        return None
    version_number = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", text)
    return version_number and version_number[1]
