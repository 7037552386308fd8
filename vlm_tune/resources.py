"""Finds the templates and recipes that ship with the package, and where caches live."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from vlm_tune.errors import Problem, RecipeError
from vlm_tune.paths import check_writable, is_file, shown_path

CACHE = "the cache folder (VLM_TUNE_CACHE)"

KERNELS_VARIABLE = "VLM_TUNE_KERNELS"
"""The environment variable that says what computes in bf16 on a CPU."""

KERNEL_CHOICES = ("auto", "reference", "emulate")
"""Its values: what is best on this CPU, plain torch, or the kernels with the instructions that the CPU lacks emulated."""

KERNELS = 128
"""oneDNN's compiled kernels that a process keeps: some steps' worth, for a step has about thirty kinds of matrix product."""

KERNEL_BYTES = 800_000
"""What one takes of the heap, in both of oneDNN's caches together (measured: `dev/log.md`)."""


SMALLEST_BLOCK = 16384
"""Bytes from which on a tensor lies in the range of addresses that training keeps for them; smaller ones are malloc's."""


def resource_folder(name: str) -> Path:
    """The folder `data_templates` or `recipes`: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"{name} is missing from this installation of vlm_tune")


def resource_names(kind: str) -> list[str]:
    """The names a recipe may use: files of `kind` (as `data_templates/chat`) without their ending."""
    folder = resource_folder(kind.split("/")[0]).joinpath(*kind.split("/")[1:])
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def find_resource(kind: str, name: str) -> Path | None:
    """The shipped file called `name`, or the user's own file at that path; None where there is neither."""
    folder = resource_folder(kind.split("/")[0]).joinpath(*kind.split("/")[1:])
    if name in resource_names(kind):
        return folder / f"{name}.yaml"
    own = Path(name)
    return own if own.suffix in (".yaml", ".yml") and is_file(own) else None


def cache_folder(name: str) -> Path:
    """Where one kind of cache lives: under $VLM_TUNE_CACHE, or ~/.cache/vlm_tune."""
    return Path(os.environ.get("VLM_TUNE_CACHE", Path.home() / ".cache" / "vlm_tune")) / name


def check_cache(folder: Path) -> None:
    """Checks that a cache folder can be written. Raises `RecipeError` that names it and VLM_TUNE_CACHE."""
    check_writable(folder, CACHE, folder=True)


@contextlib.contextmanager
def cache_room(folder: Path) -> Iterator[None]:
    """Around writing into a cache folder: a full disk becomes a `RecipeError` that names it and VLM_TUNE_CACHE."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise full_cache(folder, os.strerror(error.errno)) from error


def full_cache(folder: Path, reason: str) -> RecipeError:
    """The error for a cache that has no room for what is to be written."""
    message = f"{CACHE} is full: {reason}; make room, or set VLM_TUNE_CACHE to a larger place"
    return RecipeError([Problem(shown_path(folder), message)])


def kernel_choice() -> str:
    """$VLM_TUNE_KERNELS, or auto where it is not set. Raises `RecipeError` for a value that is none of `KERNEL_CHOICES`."""
    choice = os.environ.get(KERNELS_VARIABLE) or "auto"
    if choice not in KERNEL_CHOICES:
        raise RecipeError(
            [Problem(KERNELS_VARIABLE, f"{choice!r} is none of {', '.join(KERNEL_CHOICES)}")]
        )
    return choice


def cache_limit() -> int:
    """Bytes that a cache folder may hold: $VLM_TUNE_CACHE_GB times 10^9, or 100 GB."""
    return int(float(os.environ.get("VLM_TUNE_CACHE_GB", "100")) * 1e9)


def trim_cache(folder: Path, keep: Path) -> list[Path]:
    """Removes what was used longest ago from a folder of files until it is within its limit, `keep` excepted; what it removed.

    A process that has one of them mapped keeps reading it.
    """
    found = []
    for path in folder.iterdir():
        if ".tmp-" in path.name:  # another process's, in the making
            continue
        with contextlib.suppress(FileNotFoundError):
            found.append((path.stat().st_mtime, path.stat().st_size, path))
    total = sum(size for _, size, _ in found)
    removed = []
    for _, size, path in sorted(found):
        if total <= cache_limit():
            break
        if path.stem != keep.stem:
            path.unlink(missing_ok=True)
            total -= size
            removed.append(path)
    return removed
