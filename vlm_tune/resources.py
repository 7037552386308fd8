"""Resources of a process: shipped templates and recipes, folders of caches, kernels, cores."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import resource
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from vlm_tune.errors import Problem, RecipeError
from vlm_tune.paths import check_writable, is_file, shown_path
from vlm_tune.quoting import quoted

CACHE = "the cache folder (VLM_TUNE_CACHE)"

CACHE_SIZE_VARIABLE = "VLM_TUNE_CACHE_GB"

KERNELS_VARIABLE = "VLM_TUNE_KERNELS"
"""The environment variable that chooses what computes in bf16 on a CPU."""

KERNEL_CHOICES = ("auto", "reference", "emulate")
"""Its values, and those of the recipe's `train.kernels`.

`auto` is the best for this CPU, `reference` is plain torch, and `emulate` runs the kernels and
emulates the instructions that the CPU lacks.
"""

KERNELS = 64
"""oneDNN's compiled kernels that a process caches.

They are those of a step, which has about thirty kinds of matrix product: a batch of another length
needs others.
"""

KERNEL_BYTES = 800_000
"""Heap bytes of one such kernel, in both of oneDNN's caches together (measured: `dev/log.md`)."""


SMALLEST_BLOCK = 16384
"""Bytes from which on a tensor lies in the address range that training reserves for tensors.

Smaller ones are allocated by malloc.
"""


def resource_folder(name: str) -> Path:
    """The folder `data_templates` or `recipes`: in the package, or beside it in a checkout."""
    package = Path(__file__).parent
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"{name} is missing from this installation of vlm_tune")


def resource_names(kind: str) -> list[str]:
    """Names that a recipe may use: files of `kind` (as `data_templates/chat`) without suffix."""
    folder = resource_folder(kind.split("/")[0]).joinpath(*kind.split("/")[1:])
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def find_resource(kind: str, name: str) -> Path | None:
    """Returns the shipped file called `name`, else the user's YAML file at that path, or None."""
    folder = resource_folder(kind.split("/")[0]).joinpath(*kind.split("/")[1:])
    if name in resource_names(kind):
        return folder / f"{name}.yaml"
    user_path = Path(name)
    return user_path if user_path.suffix in (".yaml", ".yml") and is_file(user_path) else None


def cache_folder(name: str) -> Path:
    """The folder of one kind of cache: under $VLM_TUNE_CACHE, or ~/.cache/vlm_tune.

    An empty variable counts as unset: it would be the working directory.
    """
    return Path(os.environ.get("VLM_TUNE_CACHE") or Path.home() / ".cache" / "vlm_tune") / name


def check_cache(folder: Path) -> None:
    """Raises `RecipeError` if a cache can't be written or its size is none; names the variable."""
    cache_limit()
    check_writable(folder, CACHE, folder=True)


def usable_cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def rank_cores() -> int:
    """This rank's share of the cores of its node, at least one."""
    return max(usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def peak_resident_memory(process: int | str = "self") -> int:
    """The largest resident set of a process so far, in bytes.

    Linux's VmHWM restarts at exec. `ru_maxrss` is inherited from the program that called it: a
    process that a notebook of 8 GB starts would never report less.

    Raises:
        ProcessLookupError: another process than this one has ended, or the system can't tell.
    """
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if process != "self":
        raise ProcessLookupError(process)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def cache_room(folder: Path) -> Iterator[None]:
    """Context for writing into a cache folder: turns a full disk into a `RecipeError`.

    The error names the folder and VLM_TUNE_CACHE.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise full_cache(folder, os.strerror(error.errno)) from error


def full_cache(folder: Path, reason: str) -> RecipeError:
    """Returns the error for a cache that has no room for new files."""
    message = f"{CACHE} is full: {reason}; make room, or set VLM_TUNE_CACHE to a larger place"
    return RecipeError([Problem(shown_path(folder), message)])


_recipe_kernels: ContextVar[str] = ContextVar("recipe_kernels", default="auto")


@contextlib.contextmanager
def kernel_setting(kernels: str) -> Iterator[None]:
    """Context in which a recipe's `train.kernels` holds, where $VLM_TUNE_KERNELS is not set.

    It holds for the thread that enters it.
    """
    before = _recipe_kernels.set(kernels)
    try:
        yield
    finally:
        _recipe_kernels.reset(before)


def kernel_choice() -> str:
    """Returns $VLM_TUNE_KERNELS, where it is not set the recipe's choice, and auto without one.

    Raises `RecipeError` for a value of the variable that is not in `KERNEL_CHOICES`.
    """
    choice = os.environ.get(KERNELS_VARIABLE)
    if not choice:
        return _recipe_kernels.get()
    if choice not in KERNEL_CHOICES:
        raise RecipeError(
            [Problem(KERNELS_VARIABLE, f"{choice!r} is not one of {', '.join(KERNEL_CHOICES)}")]
        )
    return choice


def chosen_kernels() -> str:
    """Returns where the choice of kernels comes from and what it is, for messages."""
    by_variable = bool(os.environ.get(KERNELS_VARIABLE))
    return (
        f"{KERNELS_VARIABLE}={kernel_choice()}"
        if by_variable
        else f"train.kernels: {kernel_choice()}"
    )


def cache_limit() -> int:
    """The bytes that a cache folder may hold: $VLM_TUNE_CACHE_GB times 10^9, or 100 GB.

    Raises `RecipeError` for a value of the variable that is no finite number from 0 on.
    """
    text = os.environ.get(CACHE_SIZE_VARIABLE) or "100"
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = math.nan
    if not 0 <= gigabytes < math.inf:
        message = f"{quoted(text)} is not a size in GB: expected a number that is 0 or more"
        raise RecipeError([Problem(CACHE_SIZE_VARIABLE, message)])
    return int(gigabytes * 1e9)


def trim_cache(folder: Path, *keep: Path) -> list[Path]:
    """Removes the least recently used files of a folder until it is within `cache_limit`.

    Files with the stem of one of `keep` stay. A process that has a removed file mapped keeps
    reading it.

    Returns:
        The removed files.
    """
    entries = []
    for path in folder.iterdir():
        if ".tmp-" in path.name:  # another process is writing it
            continue
        with contextlib.suppress(FileNotFoundError):
            entries.append((path.stat().st_mtime, path.stat().st_size, path))
    total = sum(size for _, size, _ in entries)
    removed = []
    stems = {path.stem for path in keep}
    for _, size, path in sorted(entries):
        if total <= cache_limit():
            break
        if path.stem not in stems:
            path.unlink(missing_ok=True)
            total -= size
            removed.append(path)
    return removed
