"""The package's C++ parts: compiled by the machine's compiler on first use, and cached in a folder.

The kernels are written for CPUs with AMX. For other CPUs the same sources are compiled with
`emulation.h` included first, which implements the AMX instructions in AVX-512, or in plain C++ for
a CPU without AVX-512.
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

from vlm_tune.errors import Problem, RecipeError
from vlm_tune.resources import cache_folder, chosen_kernels, kernel_choice, usable_cores

KERNELS = "kernels"
PARTS = {
    KERNELS: ("gated", "tree_attention", "low_rank", "head", "decoder"),
    "allocator": ("allocator",),
}
"""The source files of each part."""

SIZES = {KERNELS: ("decoder_room", "decoder_scratch")}
"""Functions that return a number of bytes, as int64."""

THREADS = 16
"""Most threads: with more, each has too few rows to repay the packing of weights."""

COMPILE_SECONDS = 1200
"""Timeout of the compiler for one file, on a busy machine."""

Mode = Literal["amx", "avx512", "portable", "reference"]
"""Implementations: kernels for AMX, the same emulated in AVX-512 or plain C++, or plain torch."""

IN_WORDS: dict[Mode, str] = {
    "amx": "kernels for AMX",
    "avx512": "kernels with AMX emulated in AVX-512",
    "portable": "kernels with AMX and AVX-512 emulated in plain C++",
    "reference": "plain torch",
}


@dataclass(frozen=True)
class KernelStatus:
    """Which implementation runs attention, LoRA, MLPs and the loss in bf16 on this CPU, and why."""

    choice: str
    mode: Mode
    reason: str

    def __str__(self) -> str:
        return f"{IN_WORDS[self.mode]}: {self.reason}"


def compiler() -> str | None:
    """The path of the C++ compiler, the one that torch.compile would use too; None if missing."""
    return next(
        (
            path
            for name in (os.environ.get("CXX", "c++"), "g++", "clang++")
            if (path := shutil.which(name))
        ),
        None,
    )


@functools.cache
def has_amx() -> bool:
    """Whether the CPU has AMX with bf16."""
    return torch.cpu._is_amx_tile_supported()


def emulation() -> Mode | None:
    """How AMX is emulated on this machine; None if it can't be, which is on all but x86-64."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    return "avx512" if torch.cpu._is_avx512_supported() else "portable"


@functools.cache
def prefers_portable() -> bool:
    """Whether the kernels in plain C++ are faster than torch on this CPU.

    By measurement that is so with AVX2 but without AVX-512 (`docs/speed.md`).
    """
    return emulation() == "portable" and torch.cpu._is_avx2_supported()


def kernel_status() -> KernelStatus:
    """The implementation that this machine would use now, found without compiling anything.

    It depends on $VLM_TUNE_KERNELS, the recipe's `train.kernels`, the CPU and the compiler. Raises
    `RecipeError` if the variable is invalid, or the choice requires what this machine can't do.
    """
    choice = kernel_choice()
    emulated = emulation()
    if choice == "reference":
        return KernelStatus(choice, "reference", chosen_kernels())
    if emulated is None:
        reason = (
            f"the kernels are for x86-64, and this is {platform.machine() or 'another machine'}"
        )
    elif compiler() is None:
        reason = "the kernels need a C++ compiler, and none was found (c++, g++, clang++, $CXX)"
    elif (failure := _failures.get((KERNELS, _mode(choice)))) is not None:
        reason = failure
    elif choice == "emulate":
        return KernelStatus(choice, emulated, chosen_kernels())
    else:
        reasons: dict[Mode, str] = {
            "amx": "the CPU has AMX",
            "portable": (
                "the CPU has neither AMX nor AVX-512, and torch's own products of bf16 are slower "
                "there"
            ),
            "reference": "the CPU has no AMX",
        }
        return KernelStatus(choice, _mode(choice), reasons[_mode(choice)])
    if choice == "emulate":
        raise RecipeError([Problem(chosen_kernels(), reason)])
    return KernelStatus(choice, "reference", reason)


def _mode(choice: str) -> Mode:
    """The mode of a choice, as far as the CPU decides it.

    It is called before each layer, so it does not look for a compiler.
    """
    if choice == "auto":
        return "amx" if has_amx() else "portable" if prefers_portable() else "reference"
    return (emulation() if choice == "emulate" else None) or "reference"


def code(name: str) -> bytes:
    """The contents of all source files of a part, headers included."""
    folder = Path(__file__).parent
    return b"".join(
        path.read_bytes()
        for path in (*(folder / f"{file}.cpp" for file in PARTS[name]), *sorted(folder.glob("*.h")))
    )


def options(name: str, mode: Mode) -> list[str]:
    """The compiler flags of a part."""
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
    # A CPU with AVX2 has all of x86-64-v3.
    return [
        *always,
        "-march=x86-64-v3" if torch.cpu._is_avx2_supported() else "-march=x86-64",
        *before,
    ]


_failures: dict[tuple[str, Mode], str] = {}
"""Why a part could not be compiled or loaded in this process, in one line."""


def library(name: str) -> ctypes.CDLL | None:
    """A compiled part; None if this machine does not use it or can't compile it.

    A failed compilation is logged once. Raises `RecipeError` for the kernels if $VLM_TUNE_KERNELS
    is invalid, or requires emulated kernels that can't be had.
    """
    choice = kernel_choice() if name == KERNELS else "auto"
    mode = _mode(choice) if name == KERNELS else "reference"
    if name == KERNELS and mode == "reference" and choice != "emulate":
        return None
    part = load(name, mode)
    if part is None and choice == "emulate":
        kernel_status()  # raises with the reason
    return part


@functools.cache
def load(name: str, mode: Mode) -> ctypes.CDLL | None:
    """A part for a mode, from the cache folder or compiled.

    None if that fails, which is logged once.
    """
    cxx = compiler()
    if cxx is None or (name == KERNELS and mode == "reference"):
        return None
    flags = options(name, mode)
    key = hashlib.sha256(code(name) + f"{torch.__version__} {cxx} {flags}".encode()).hexdigest()[
        :16
    ]
    file = f"{name}-{mode}-{key}.so" if name == KERNELS else f"{name}-{key}.so"
    try:
        part = _load(cxx, name, flags, file)
    except (OSError, subprocess.SubprocessError) as error:
        _failures[name, mode] = f"the {name} can't be compiled or loaded: {_in_one_line(error)}"
        logging.getLogger(__name__).warning("%s; the run goes on without", _failures[name, mode])
        return None
    for function in SIZES.get(name, ()):
        getattr(part, function).restype = ctypes.c_int64
    return part


def kernels() -> ctypes.CDLL:
    """The kernels. They must exist (`has_kernels`)."""
    part = library(KERNELS)
    assert part is not None
    return part


@torch.compiler.assume_constant_result
def has_kernels() -> bool:
    """Whether the kernels exist, and there are few enough threads for them."""
    return torch.get_num_threads() <= THREADS and library(KERNELS) is not None


def unavailable_reason() -> str | None:
    """The reason why there are no kernels here; None if there are (`has_kernels`)."""
    if has_kernels():
        return None
    if library(KERNELS) is not None:
        return f"the kernels are for at most {THREADS} threads, and torch has more"
    return kernel_status().reason


def range_allocator() -> ctypes.CDLL | None:
    """The allocator of tensors; None if it can't be compiled, or if addresses are limited.

    It reserves as many addresses as there is memory, which a limit (ulimit -v) would forbid.
    """
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    return None if limited else library("allocator")


# --- files ----------------------------------------------------------------------------------------


def why_not_trusted(state: os.stat_result) -> str | None:
    """Why another user may have written a file or folder.

    None if it belongs to this user or root, and nobody else may write to it.
    """
    if state.st_uid not in (0, os.getuid()):
        return f"it belongs to user {state.st_uid}"
    if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to it (mode {stat.S_IMODE(state.st_mode):04o})"
    return None


def _load(cxx: str, name: str, flags: list[str], file: str) -> ctypes.CDLL:
    """A part from the first trusted folder, compiled into it if missing.

    Raises `OSError` and `subprocess.SubprocessError`.
    """
    for folder in (cache_folder("kernels"), cache_folder(f"kernels-{os.getuid()}")):
        path = _private(folder)
        if path is None:
            continue
        part = _open(path / file)
        if part is None and os.access(path, os.W_OK):
            with _alone(path):
                part = _open(path / file)  # another process may have been quicker
                if part is None:
                    _compile(cxx, name, flags, path / file)
                    part = _open(path / file)
        if part is not None:
            return part
    with tempfile.TemporaryDirectory(prefix="vlm_tune-") as folder:
        _compile(cxx, name, flags, Path(folder) / file)
        return ctypes.CDLL(str(Path(folder) / file))


def _private(folder: Path) -> Path | None:
    """Creates a folder that only this user and root may write to, and returns its resolved path.

    None if there can't be one.
    """
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
    """Loads a compiled part; None if it does not exist, or may be another user's (logged)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        logging.getLogger(__name__).warning(
            "%s is not used and is compiled again: %s", path, error.strerror
        )
        return None
    reason = why_not_trusted(os.fstat(descriptor))
    if reason:
        os.close(descriptor)
        logging.getLogger(__name__).warning(
            "%s is not used and is compiled again: %s", path, reason
        )
        return None
    # It is loaded by its descriptor, so that nobody can replace the file after the check. The
    # descriptor stays open: the loader knows a library by its name, and would take the next file
    # with the same descriptor number for this one.
    by_descriptor = Path(f"/proc/self/fd/{descriptor}")
    return ctypes.CDLL(str(by_descriptor if by_descriptor.exists() else path))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Locks a folder for compilation, because all ranks of a job would compile the same."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _compile(cxx: str, name: str, flags: list[str], path: Path) -> None:
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        linked = Path(folder) / "part.so"
        sources = [Path(__file__).with_name(f"{file}.cpp") for file in PARTS[name]]
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        compile_one = [cxx, *flags, "-c", f"-I{root}/include"]
        with ThreadPoolExecutor(usable_cores()) as pool:
            jobs = [
                pool.submit(_run, [*compile_one, str(source), "-o", to])
                for source, to in zip(sources, objects, strict=True)
            ]
            for job in jobs:
                job.result()
        # Linked without an OpenMP library: a second one beside torch's would have its own threads.
        _run([cxx, "-shared", *objects, "-o", str(linked), f"-L{root}/lib", "-ltorch_cpu", "-lc10"])
        linked.chmod(0o755)
        linked.replace(path)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_SECONDS)


def _in_one_line(error: OSError | subprocess.SubprocessError) -> str:
    """A one-line message about an error: the compiler's first error, or the system's message."""
    output = getattr(error, "stderr", None) or b""
    lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    first = next(
        (line for line in lines if "error" in line.lower()), lines[-1] if lines else str(error)
    )
    return first[:300]


def address(tensor: Tensor | None) -> int | None:
    """A tensor's address; None for None."""
    return None if tensor is None else tensor.data_ptr()


def pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    """The addresses of tensors as C pointers, null for None."""
    return [ctypes.c_void_p(address(tensor)) for tensor in tensors]
