"""Parts of ours in C++: compiled by the machine's compiler when first wanted, and kept in the cache folder.

The kernels are written for CPUs with AMX. For others the same sources are compiled with `emulation.h` before them, which
writes the AMX instructions in AVX-512, or in plain C++ where a CPU lacks that too.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import resource
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vlm_tune.errors import Problem, RecipeError
from vlm_tune.resources import KERNELS_VARIABLE, cache_folder, kernel_choice

KERNELS = "kernels"
PARTS = {
    KERNELS: ("gated", "tree_attention", "low_rank", "head", "decoder"),
    "allocator": ("allocator",),
}
"""The files that each part is made of."""

SIZES = {KERNELS: ("decoder_room", "decoder_scratch")}
"""Functions that give a number of bytes."""

THREADS = 16
"""Threads above which each has too few rows for the weights that the kernels pack."""

COMPILE_SECONDS = 1200
"""How long the compiler may take for one file, on a machine with much else to do."""

Mode = Literal["amx", "avx512", "portable", "reference"]
"""What computes: kernels for AMX, the same emulated in AVX-512 or in plain C++, or plain torch."""

IN_WORDS: dict[Mode, str] = {
    "amx": "kernels for AMX",
    "avx512": "kernels with AMX emulated in AVX-512",
    "portable": "kernels with AMX and AVX-512 emulated in plain C++",
    "reference": "plain torch",
}


@dataclass(frozen=True)
class KernelStatus:
    """What computes attention, LoRA layers, feed-forward parts and the loss in bf16 on this CPU, and why, in one line."""

    choice: str
    mode: Mode
    reason: str

    def __str__(self) -> str:
        return f"{IN_WORDS[self.mode]}: {self.reason}"


def compiler() -> str | None:
    """The C++ compiler that torch's own compiler would take too."""
    return next(
        (
            found
            for name in (os.environ.get("CXX", "c++"), "g++", "clang++")
            if (found := shutil.which(name))
        ),
        None,
    )


@functools.cache
def has_amx() -> bool:
    """Whether the CPU multiplies tiles of bf16."""
    return torch.cpu._is_amx_tile_supported()


def emulation() -> Mode | None:
    """How AMX is emulated on this machine; None where it can't be, which is on all but x86-64."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    return "avx512" if torch.cpu._is_avx512_supported() else "portable"


@functools.cache
def prefers_portable() -> bool:
    """Whether the kernels in plain C++ were measured to be faster than torch here: with AVX2, but without AVX-512 (`docs/speed.md`)."""
    return emulation() == "portable" and torch.cpu._is_avx2_supported()


def kernel_status() -> KernelStatus:
    """What would compute on this machine now, by $VLM_TUNE_KERNELS, the CPU and the compiler; nothing is compiled to find out.

    Raises `RecipeError` for a value of $VLM_TUNE_KERNELS that is none, or that asks for what this machine can't do.
    """
    choice = kernel_choice()
    emulated = emulation()
    if choice == "reference":
        return KernelStatus(choice, "reference", f"{KERNELS_VARIABLE}=reference")
    if emulated is None:
        reason = (
            f"the kernels are for x86-64, and this is {platform.machine() or 'another machine'}"
        )
    elif compiler() is None:
        reason = "the kernels need a C++ compiler, and none was found (c++, g++, clang++, $CXX)"
    elif (failure := _failures.get((KERNELS, _mode(choice)))) is not None:
        reason = failure
    elif choice == "emulate":
        return KernelStatus(choice, emulated, f"{KERNELS_VARIABLE}=emulate")
    else:
        reasons: dict[Mode, str] = {
            "amx": "the CPU has AMX",
            "portable": "the CPU has neither AMX nor AVX-512, and torch's own products of bf16 are slower there",
            "reference": "the CPU has no AMX",
        }
        return KernelStatus(choice, _mode(choice), reasons[_mode(choice)])
    if choice == "emulate":
        raise RecipeError([Problem(f"{KERNELS_VARIABLE}=emulate", reason)])
    return KernelStatus(choice, "reference", reason)


def _mode(choice: str) -> Mode:
    """The mode of a choice, as far as the CPU decides it: asked before each layer, so that nothing is looked for."""
    if choice == "auto":
        return "amx" if has_amx() else "portable" if prefers_portable() else "reference"
    return (emulation() if choice == "emulate" else None) or "reference"


def code(name: str) -> bytes:
    """All that a part is made of."""
    folder = Path(__file__).parent
    return b"".join(
        path.read_bytes()
        for path in (*(folder / f"{file}.cpp" for file in PARTS[name]), *sorted(folder.glob("*.h")))
    )


def options(name: str, mode: Mode) -> list[str]:
    """What a part is compiled with."""
    always = ["-O3", "-std=c++20", "-fPIC"]
    if name != KERNELS:
        return always
    always.append("-fopenmp")
    if mode == "amx":
        return [*always, "-march=sapphirerapids"]
    before = ["-include", str(Path(__file__).with_name("emulation.h")), "-Wno-psabi"]
    if mode == "avx512":
        return [
            *always,
            "-march=x86-64-v4",
            *(["-mavx512bf16"] if torch.cpu._is_avx512_bf16_supported() else []),
            *before,
        ]
    # What a CPU with AVX2 has beside it is all of that level.
    return [
        *always,
        "-march=x86-64-v3" if torch.cpu._is_avx2_supported() else "-march=x86-64",
        *before,
    ]


_failures: dict[tuple[str, Mode], str] = {}
"""Why a part could not be compiled or loaded in this process, in one line."""


def library(name: str) -> ctypes.CDLL | None:
    """A part, compiled; None where it is not to be used on this machine, or can't be compiled (which is logged once).

    Raises `RecipeError` for the kernels where $VLM_TUNE_KERNELS is none of its values, or asks for emulated ones in vain.
    """
    choice = kernel_choice() if name == KERNELS else "auto"
    mode = _mode(choice) if name == KERNELS else "reference"
    if name == KERNELS and mode == "reference" and choice != "emulate":
        return None
    found = load(name, mode)
    if found is None and choice == "emulate":
        kernel_status()  # raises with the reason
    return found


@functools.cache
def load(name: str, mode: Mode) -> ctypes.CDLL | None:
    """A part for a mode, from the cache folder or compiled; None where that fails, which is logged once."""
    cxx = compiler()
    if cxx is None or (name == KERNELS and mode == "reference"):
        return None
    given = options(name, mode)
    key = hashlib.sha256(code(name) + f"{torch.__version__} {cxx} {given}".encode()).hexdigest()[
        :16
    ]
    file = f"{name}-{mode}-{key}.so" if name == KERNELS else f"{name}-{key}.so"
    try:
        found = _load(cxx, name, given, file)
    except (OSError, subprocess.SubprocessError) as error:
        _failures[name, mode] = f"the {name} can't be compiled or loaded: {_in_one_line(error)}"
        logging.getLogger(__name__).warning("%s; the run goes on without", _failures[name, mode])
        return None
    for function in SIZES.get(name, ()):
        getattr(found, function).restype = ctypes.c_int64
    return found


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


# --- files -----------------------------------------------------------------------------------------------------------


def why_not_trusted(state: os.stat_result) -> str | None:
    """Why a file or folder may be another user's work: None where it is this user's or root's, and nobody else may write to it."""
    if state.st_uid not in (0, os.getuid()):
        return f"it belongs to user {state.st_uid}"
    if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to it (mode {stat.S_IMODE(state.st_mode):04o})"
    return None


def _load(cxx: str, name: str, given: list[str], file: str) -> ctypes.CDLL:
    """A part from the first folder that may be trusted, compiled there if it is not; raises OSError and those of subprocess."""
    for folder in (cache_folder("kernels"), cache_folder(f"kernels-{os.getuid()}")):
        path = _private(folder)
        if path is None:
            continue
        found = _open(path / file)
        if found is None and os.access(path, os.W_OK):
            with _alone(path):
                found = _open(path / file)  # another process may have been quicker
                if found is None:
                    _compile(cxx, name, given, path / file)
                    found = _open(path / file)
        if found is not None:
            return found
    with tempfile.TemporaryDirectory(prefix="vlm_tune-") as folder:
        _compile(cxx, name, given, Path(folder) / file)
        return ctypes.CDLL(str(Path(folder) / file))


def _private(folder: Path) -> Path | None:
    """A folder without links in its path that nobody but this user and root may write to; None where there can't be one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except PermissionError:
        return None
    real = folder.resolve()
    state = real.stat()
    if state.st_uid == os.getuid() and why_not_trusted(state):
        real.chmod(0o700)
        state = real.stat()
    reason = why_not_trusted(state)
    if reason:
        logging.getLogger(__name__).warning("compiled parts in %s are not used: %s", folder, reason)
    return None if reason else real


def _open(path: Path) -> ctypes.CDLL | None:
    """A compiled part; None where there is none, or it may be another user's work, which is logged."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        logging.getLogger(__name__).warning(
            "%s is not used, and compiled anew: %s", path, error.strerror
        )
        return None
    reason = why_not_trusted(os.fstat(descriptor))
    if reason:
        os.close(descriptor)
        logging.getLogger(__name__).warning("%s is not used, and compiled anew: %s", path, reason)
        return None
    # By its descriptor: nobody can put another file in its place after it was looked at. It stays open, because the loader knows
    # a library by its name, and would take the next one that got the same number for this one.
    own = Path(f"/proc/self/fd/{descriptor}")
    return ctypes.CDLL(str(own if own.exists() else path))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within, no other process compiles into a folder: the ranks of a job would all compile the same."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _compile(cxx: str, name: str, given: list[str], path: Path) -> None:
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        linked = Path(folder) / "part.so"
        sources = [Path(__file__).with_name(f"{file}.cpp") for file in PARTS[name]]
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        compile_one = [cxx, *given, "-c", f"-I{root}/include"]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [
                pool.submit(_run, [*compile_one, str(source), "-o", to])
                for source, to in zip(sources, objects, strict=True)
            ]
            for job in jobs:
                job.result()
        # Linked without OpenMP's library: a second one beside torch's would have threads of its own.
        _run([cxx, "-shared", *objects, "-o", str(linked), f"-L{root}/lib", "-ltorch_cpu", "-lc10"])
        linked.chmod(0o755)
        linked.replace(path)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_SECONDS)


def _in_one_line(error: OSError | subprocess.SubprocessError) -> str:
    """What went wrong: the compiler's first error, or what the system says."""
    output = getattr(error, "stderr", None) or b""
    lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    first = next(
        (line for line in lines if "error" in line.lower()), lines[-1] if lines else str(error)
    )
    return first[:300]


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor begins; None for none, and for a plan's tensors, which have shapes alone."""
    return None if tensor is None or isinstance(tensor, FakeTensor) else tensor.data_ptr()


def pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    """Where tensors begin, as a kernel takes them; null for None."""
    return [ctypes.c_void_p(address(tensor)) for tensor in tensors]
