"""The environment that a run's numbers depend on besides its recipe.

Versions of libraries and drivers, device, threads, processes, engine.
"""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator

from vlm_tune.config.engine import AnyEngine
from vlm_tune.kernels.cpu.native import kernel_status
from vlm_tune.system import cuda

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
    return {
        "capability": f"{properties.major}.{properties.minor}",
        "device_memory_mb": properties.total_memory // 1_000_000,
        "gpus": torch.cuda.device_count(),
        **cuda(),
    }
