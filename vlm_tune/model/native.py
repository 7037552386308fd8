"""Kernels of ours in C++, for CPUs with AMX: compiled by the machine's compiler when first wanted, and kept in the cache folder."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from vlm_tune.resources import cache_folder


def compiler() -> str | None:
    """The C++ compiler that torch's own compiler would take too."""
    return next((found for name in (os.environ.get("CXX", "c++"), "g++", "clang++") if (found := shutil.which(name))), None)


def source(name: str) -> Path:
    """The file of a kernel."""
    return Path(__file__).with_name(f"{name}.cpp")


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """A kernel, compiled; None where the CPU has no AMX or it can't be compiled."""
    cxx = compiler()
    if cxx is None or not torch.cpu._is_amx_tile_supported():
        return None
    key = hashlib.sha256(source(name).read_bytes() + f"{torch.__version__} {cxx}".encode()).hexdigest()[:16]
    path = cache_folder("compiled") / f"{name}-{key}.so"
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            _compile(cxx, source(name), path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error).encode()
        why = said.decode(errors="replace")[-300:]
        logging.getLogger(__name__).warning("the kernel %s can't be used, a step takes longer: %s", name, why)
        return None


def _compile(cxx: str, file: Path, path: Path) -> None:
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        # Linked without OpenMP's library: a second one beside torch's would have threads of its own.
        options = ["-O3", "-march=sapphirerapids", "-std=c++20", "-fPIC"]
        unlinked, linked = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        steps = [
            [cxx, *options, "-fopenmp", "-c", f"-I{root}/include", str(file), "-o", str(unlinked)],
            [cxx, "-shared", str(unlinked), "-o", str(linked), f"-L{root}/lib", "-ltorch_cpu", "-lc10"],
        ]
        for step in steps:
            subprocess.run(step, check=True, capture_output=True, timeout=300)
        # Two processes may compile at once: whichever is last puts the same in its place.
        linked.replace(path)


def pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    """Where tensors begin, as a kernel takes them; null for None."""
    return [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
