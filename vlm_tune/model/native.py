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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vlm_tune.resources import cache_folder

KERNELS = "kernels"
PARTS = {KERNELS: ("gated", "tree_attention", "low_rank", "head", "decoder"), "allocator": ("allocator",)}
"""The files that each part is made of."""

AMX = ("-march=sapphirerapids", "-fopenmp")
OPTIONS = {KERNELS: AMX, "allocator": ()}
"""What each part is compiled with beside the options of all."""

SIZES = {KERNELS: ("decoder_room", "decoder_scratch")}
"""Functions that give a number of bytes."""

THREADS = 16
"""Threads above which each has too few rows for the weights that the kernels pack."""


def compiler() -> str | None:
    """The C++ compiler that torch's own compiler would take too."""
    return next((found for name in (os.environ.get("CXX", "c++"), "g++", "clang++") if (found := shutil.which(name))), None)


def code(name: str) -> bytes:
    """All that a part is made of."""
    folder = Path(__file__).parent
    return b"".join(path.read_bytes() for path in (*(folder / f"{file}.cpp" for file in PARTS[name]), *sorted(folder.glob("*.h"))))


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
        logging.getLogger(__name__).warning("the %s can't be compiled or loaded, a run goes on without: %s", name, why)
        return None


def kernels() -> ctypes.CDLL:
    """The kernels, where `has_kernels`."""
    found = library(KERNELS)
    assert found is not None
    return found


@torch.compiler.assume_constant_result
def has_kernels() -> bool:
    """Whether they are there, and a thread has enough rows for them."""
    return torch.get_num_threads() <= THREADS and library(KERNELS) is not None


def range_allocator() -> ctypes.CDLL | None:
    """The allocator of tensors; None also where addresses are limited (ulimit -v), as many of which it takes as there is memory."""
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    return None if limited else library("allocator")


def _compile(cxx: str, name: str, path: Path) -> None:
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        # Linked without OpenMP's library: a second one beside torch's would have threads of its own.
        options = ["-O3", "-std=c++20", "-fPIC", *OPTIONS[name]]
        linked, sources = Path(folder) / "part.so", [Path(__file__).with_name(f"{file}.cpp") for file in PARTS[name]]
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        compile_one = [cxx, *options, "-c", f"-I{root}/include"]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [pool.submit(_run, [*compile_one, str(source), "-o", made]) for source, made in zip(sources, objects, strict=True)]
            for job in jobs:
                job.result()
        _run([cxx, "-shared", *objects, "-o", str(linked), f"-L{root}/lib", "-ltorch_cpu", "-lc10"])
        # Two processes may compile at once: whichever is last puts the same in its place.
        linked.replace(path)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=300)


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor begins; None for none, and for a plan's tensors, which have shapes alone."""
    return None if tensor is None or isinstance(tensor, FakeTensor) else tensor.data_ptr()


def pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    """Where tensors begin, as a kernel takes them; null for None."""
    return [ctypes.c_void_p(address(tensor)) for tensor in tensors]
