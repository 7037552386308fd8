"""Parts of ours in C++: compiled by the machine's compiler when first wanted, and kept in the cache folder."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from vlm_tune.resources import cache_folder

AMX = ("-march=sapphirerapids", "-fopenmp")
OPTIONS = {"tree_attention": AMX, "low_rank": AMX, "gated": AMX, "head": AMX, "allocator": ()}
"""What each part is compiled with beside the options of all."""


def compiler() -> str | None:
    """The C++ compiler that torch's own compiler would take too."""
    return next((found for name in (os.environ.get("CXX", "c++"), "g++", "clang++") if (found := shutil.which(name))), None)


def source(name: str) -> Path:
    """The file of a part."""
    return Path(__file__).with_name(f"{name}.cpp")


def code(name: str) -> bytes:
    """All that a part is made of."""
    return b"".join(path.read_bytes() for path in (source(name), *sorted(source(name).parent.glob("*.h"))))


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """A part, compiled; None where the CPU has not what it is for (AMX) or it can't be compiled."""
    cxx = compiler()
    if cxx is None or (OPTIONS[name] is AMX and not torch.cpu._is_amx_tile_supported()):
        return None
    key = hashlib.sha256(code(name) + f"{torch.__version__} {cxx} {OPTIONS[name]}".encode()).hexdigest()[:16]
    path = cache_folder("compiled") / f"{name}-{key}.so"
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            _compile(cxx, name, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error).encode()
        why = said.decode(errors="replace")[-300:]
        logging.getLogger(__name__).warning("%s.cpp can't be compiled or loaded, a run goes on without: %s", name, why)
        return None


def range_allocator() -> ctypes.CDLL | None:
    """The allocator of tensors; None also where addresses are limited (ulimit -v), as many of which it takes as there is memory."""
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    return None if limited else library("allocator")


def _compile(cxx: str, name: str, path: Path) -> None:
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        # Linked without OpenMP's library: a second one beside torch's would have threads of its own.
        options = ["-O3", "-std=c++20", "-fPIC", *OPTIONS[name]]
        unlinked, linked = Path(folder) / "part.o", Path(folder) / "part.so"
        steps = [
            [cxx, *options, "-c", f"-I{root}/include", str(source(name)), "-o", str(unlinked)],
            [cxx, "-shared", str(unlinked), "-o", str(linked), f"-L{root}/lib", "-ltorch_cpu", "-lc10"],
        ]
        for step in steps:
            subprocess.run(step, check=True, capture_output=True, timeout=300)
        # Two processes may compile at once: whichever is last puts the same in its place.
        linked.replace(path)


def pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    """Where tensors begin, as a kernel takes them; null for None."""
    return [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
