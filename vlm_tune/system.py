"""The facts of a machine and its installed versions, as `vlm-tune env` prints them.

They hold no path, user or host name, and of the environment the variables in `VARIABLES` alone, so
that they can be shown to others.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import psutil
import torch
from packaging.requirements import Requirement  # transformers and others bring it
from packaging.utils import canonicalize_name
from torch.cuda import nccl

from vlm_tune.errors import RecipeError
from vlm_tune.kernels.cpu.native import compiler, has_amx, kernel_status
from vlm_tune.resources import usable_cores
from vlm_tune.version import __version__

LIBRARIES = (
    "torch",
    "torchvision",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "deepspeed",
    "trl",
    "datasets",
    "open_clip_torch",
    "timm",
)
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "VLM_TUNE_KERNELS",
    "WORLD_SIZE",
)
DRIVER = Path("/proc/driver/nvidia/version")
"""File in which NVIDIA's driver for Linux gives its version."""
COMPILER_SECONDS = 10


def system() -> dict[str, Any]:
    """Versions, devices, attention backends and kernels by name, as JSON holds them.

    Memory is in GB (10^9 bytes). None stands for what is not installed or not known.
    """
    return {
        "vlm_tune": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "libraries": libraries(),
        "cuda": cuda(),
        "cpu": cpu(),
        "gpus": [gpu(number) for number in range(torch.cuda.device_count())],
        "attention": attention_backends(),
        "kernels": kernels(),
        "compiler": compiler_version(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def libraries() -> dict[str, dict[str, Any]]:
    """By library its version, the range of versions tried, and whether it is within that.

    The range is that of the installed package's requirements, which follow from what its tests ran
    with.
    """
    tried = {
        canonicalize_name(requirement.name): requirement.specifier
        for requirement in map(Requirement, requires("vlm_tune") or ())
        if requirement.marker is None
    }
    facts: dict[str, dict[str, Any]] = {}
    for name in LIBRARIES:
        ranges = tried[canonicalize_name(name)]
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = None
        # A build's label, as in 2.14.1+cu130, is no part of the range.
        public = None if installed is None else installed.partition("+")[0]
        facts[name] = {
            "version": installed,
            "tried": ",".join(sorted(map(str, ranges), reverse=True)),
            "within": None if public is None else ranges.contains(public, prereleases=True),
        }
    return facts


def cuda() -> dict[str, Any]:
    """The versions of CUDA, cuDNN and NCCL that torch was built with, and of NVIDIA's driver."""
    with_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, nccl.version())) if with_nccl else None,
        "driver": driver_version(),
    }


def driver_version() -> str | None:
    """The version of NVIDIA's kernel driver; None where the system does not give it."""
    try:
        text = DRIVER.read_text()
    except OSError:
        return None
    number = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", text)
    return number and number[1]


def gpu(device: torch.device | int) -> dict[str, Any]:
    """A GPU's name, memory and compute capability; it is given by its number or as a device."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "capability": f"{properties.major}.{properties.minor}",
    }


def cpu() -> dict[str, Any]:
    """The CPU's model, cores (those that this process may use last), memory and vector units."""
    return {
        "model": cpu_model(),
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(),
        "usable": usable_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "amx": has_amx(),
    }


def cpu_model() -> str:
    """The CPU's name by Linux, else by Python."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return name[1] if name else platform.processor() or platform.machine()


def attention_backends() -> list[str]:
    """The ways to compute attention that torch offers on this machine's device."""
    if not torch.cuda.is_available():
        return ["eager", "sdpa math", "sdpa flash for CPUs"]  # every torch since 2.2 has these
    enabled = {
        "sdpa math": torch.backends.cuda.math_sdp_enabled(),
        "sdpa flash": torch.backends.cuda.flash_sdp_enabled()
        and torch.backends.cuda.is_flash_attention_available(),
        "sdpa memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "sdpa cuDNN": torch.backends.cuda.cudnn_sdp_enabled(),
        "flex": importlib.util.find_spec("triton") is not None,
    }
    return ["eager", *(name for name, there in enabled.items() if there)]


def kernels() -> dict[str, str]:
    """The mode of the kernels for CPUs on this machine, and the reason."""
    try:
        status = kernel_status()
    except RecipeError as error:
        return {"mode": "none", "reason": str(error)}
    return {"mode": status.mode, "reason": status.reason}


def compiler_version() -> str | None:
    """The first line of what the C++ compiler says of itself, without its path."""
    path = compiler()
    if path is None:
        return None
    try:
        printed = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=COMPILER_SECONDS
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return f"{Path(path).name} (it does not run)"
    return (printed.splitlines() or [Path(path).name])[0]
