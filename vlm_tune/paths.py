"""Paths that users give: expanded, validated, and checked early for whether they can be written."""

from __future__ import annotations

import errno
import os
import random
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm_tune.errors import Problem, RecipeError
from vlm_tune.quoting import quoted

ANSWERS = b'"expected"'
"""Text that every line of a file of answers holds, scored or not."""

PAGE = b"<!doctype html>"
"""The first line of every page that is written."""

FIRST_LINE = 1_000_000
"""Bytes of a file's first line that are searched for its mark."""

ATTEMPTS = 20
"""Attempts to write at a place while other processes create and remove its folders."""

SHOWN = 200
"""Characters of a path that a message shows."""


def home(path: str) -> str:
    """Expands `~` to the user's home folder; `~name` of an unknown user stays as it is."""
    return os.path.expanduser(path)  # noqa: PTH111 - Path.expanduser raises for such a user


def check_writable(
    path: str | Path, what: str, *, folder: bool = False, mark: bytes | None = None
) -> None:
    """Checks that a file can be written at `path`, or in it with `folder`; leaves nothing behind.

    Missing parent folders are created and removed again, since only trying tells on every file
    system. An existing file keeps its content.

    Args:
        path: the file or folder; need not exist.
        what: the name of the file or folder in the message, as "the output folder".
        folder: whether `path` is a folder.
        mark: bytes that the first line of such a file holds. An existing file without them is not
            replaced unless it is empty, so a name given by mistake costs nobody their data.

    Raises:
        RecipeError: `path` can't be written, or a file of another kind would be replaced; the
            message gives the reason.
    """
    target = Path(path)
    with writing(target, what):
        for attempt in range(1, ATTEMPTS + 1):
            try:
                _try_writing(target, folder=folder)
                break
            except (FileNotFoundError, FileExistsError):
                # Another process that checks this place may just have made or removed a folder.
                if attempt == ATTEMPTS:
                    raise
                time.sleep(random.uniform(0.001, 0.005))
    if mark is not None:
        _check_kind(target, what, mark)


def _try_writing(target: Path, *, folder: bool) -> None:
    """Creates the missing folders and a file, and removes them again. Raises `OSError`."""
    directory = target if folder else target.parent
    missing = [each for each in (directory, *directory.parents) if not os.path.lexists(each)]
    created: list[Path] = []
    try:
        for each in reversed(missing):
            each.mkdir(exist_ok=True)
            created.append(each)
        if folder:
            _try_new(directory / f".vlm-tune-{secrets.token_hex(8)}")
        elif target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        elif os.path.lexists(target):
            os.close(os.open(target, os.O_WRONLY | os.O_APPEND))
        else:
            _try_new(target)
    finally:
        for each in reversed(created):
            try:
                each.rmdir()
            except FileNotFoundError:  # another process that checked it has removed it
                continue
            except OSError:  # another process has begun to use it
                break


def _check_kind(path: Path, what: str, mark: bytes) -> None:
    """Raises `RecipeError` if a file's first line is not blank and lacks `mark`."""
    if not is_file(path):
        return
    with writing(path, what), path.open("rb") as file:
        first = file.readline(FIRST_LINE)
    if first.strip() and mark not in first:
        message = f"{what} would replace another file; name a new one, or remove it first"
        raise RecipeError([Problem(shown_path(path), message)])


def _try_new(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    path.unlink()


@contextmanager
def writing(path: str | Path, what: str) -> Iterator[None]:
    """Context for writing `what` at `path`: turns file system errors into `RecipeError`s.

    Their messages name both.
    """
    try:
        yield
    except (OSError, UnicodeEncodeError) as error:
        raise RecipeError(
            [
                Problem(
                    shown_path(path),
                    f"{what} can't be written: {reason(error)}; choose another place",
                )
            ]
        ) from error
    except ValueError as error:
        if "\0" not in str(path):  # of a file's name Python refuses nothing else
            raise
        raise RecipeError(
            [Problem(shown_path(path), f"{what} can't be written: its name holds a NUL character")]
        ) from error


def reason(error: OSError | UnicodeEncodeError) -> str:
    """Returns a file system error in words, with the file where that helps."""
    if isinstance(error, UnicodeEncodeError):
        return "its name holds half of a surrogate pair, which no file's name can"
    text = (error.strerror or str(error) or type(error).__name__).lower()
    if error.errno in (errno.ENOTDIR, errno.EEXIST) and error.filename:
        above = next(
            (
                each
                for each in (Path(error.filename), *Path(error.filename).parents)
                if each.is_file()
            ),
            None,
        )
        return f"{shown_path(above)} is a file, and no folder" if above else text
    if error.errno == errno.ENOSPC:
        return f"{text}: make room"
    return text


def shown_path(path: str | Path) -> str:
    """Returns a path for a message.

    Characters that do not print or can't be encoded are escaped; a long path is cut in the middle.
    """
    text = "".join(
        character if character.isprintable() else repr(character)[1:-1] for character in str(path)
    )
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]}...{text[-SHOWN // 2 + 3 :]}"


def is_file(path: str | Path) -> bool:
    """Whether there is a file at `path`.

    False also for a name that no file can have (too long, NUL) and a path behind a locked folder.
    """
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: str | Path) -> bool:
    """Whether there is a folder at `path`; False also as in `is_file`."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def exists(path: str | Path) -> bool:
    """Whether there is a file or a folder at `path`; False also as in `is_file`."""
    return is_file(path) or is_folder(path)


def check_path(name: str, path: object) -> None:
    """Raises `RecipeError`, naming the argument, unless `path` is a non-empty path without NUL."""
    if not isinstance(path, str | Path) or not str(path) or "\0" in str(path):
        raise RecipeError([Problem(name, f"expected a path, got {quoted(path)}")])
