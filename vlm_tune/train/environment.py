"""The environment that a run's numbers depend on besides its recipe.

Versions of libraries, device, threads, processes, engine.
"""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator

from vlm_tune.config.engine import AnyEngine
from vlm_tune.kernels.cpu.native import kernel_status

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
        **({} if device.type == "cuda" else {"kernels": kernels.mode}),
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "engine": engine.model_dump(mode="json"),
    }
