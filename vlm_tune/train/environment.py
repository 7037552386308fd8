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
from vlm_tune.system import cuda, gpu

LIBRARIES = ("vlm_tune", "torch", "transformers", "peft", "accelerate")


def environment(accelerator: Accelerator, engine: AnyEngine) -> dict[str, Any]:
    """The values by name; runs with different values may round differently.

    Raises `RecipeError` if $VLM_TUNE_KERNELS has an unknown value or one that this machine does not
    support.
    """
    device = accelerator.device
    return {
        **{name: version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "machine": platform.machine(),
        **_device(device),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "engine": engine.model_dump(mode="json"),
    }


def _device(device: torch.device) -> dict[str, Any]:
    """Facts of the device that computes, and of a GPU also what drives it.

    The memory is in GB (10^9 bytes), `gpus` the number of those visible.
    """
    kernels = kernel_status()  # of an unknown mode it raises on every device
    if device.type != "cuda":
        return {"device": torch.backends.cpu.get_cpu_capability(), "kernels": kernels.mode}
    facts = gpu(device)
    return {"device": facts.pop("name"), **facts, "gpus": torch.cuda.device_count(), **cuda()}
