"""Paths that users give: expanded, validated, and checked early for whether they can be written."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
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

UNFINISHED = re.compile(r"\d+ requested and \d+ written")
"""What numpy says of a write that stopped in the middle."""

SHOWN = 200
"""Characters of a path that a message shows."""


def home(path: str) -> str:
    """Expands `~` to the user's home folder; `~name` of an unknown user stays as it is."""
    return os.path.expanduser(path)  # noqa: PTH111 - Path.expanduser raises for such a user


def check_writable(
    path: str | Path, what: str, *, folder: bool = False, mark: bytes | None = None
) -> None:
    """Checks that a file can be written at `path`, or in it with `folder`; leaves nothing behind.

    What is missing is created under a folder of a random name and removed again, since only trying
    tells on every file system. No other process meets these folders. An existing file keeps its
    content.

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
        _try_writing(target, folder=folder)
    if mark is not None:
        _check_kind(target, what, mark)


def _try_writing(target: Path, *, folder: bool) -> None:
    """Creates the missing part of a path elsewhere in the folder it begins in. Raises `OSError`."""
    if not folder and os.path.lexists(target):
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        os.close(os.open(target, os.O_WRONLY | os.O_APPEND))
        return
    directory = target if folder else target.parent
    missing = [each for each in (directory, *directory.parents) if not os.path.lexists(each)]
    existing = missing[-1].parent if missing else directory
    trial = existing / f".vlm-tune-{secrets.token_hex(8)}"
    trial.mkdir()
    try:
        inside = trial / directory.relative_to(existing)
        inside.mkdir(parents=True, exist_ok=True)
        (inside / ("file" if folder else target.name)).touch(exist_ok=False)
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def _check_kind(path: Path, what: str, mark: bytes) -> None:
    """Raises `RecipeError` if a file's first line is not blank and lacks `mark`."""
    if not is_file(path):
        return
    with writing(path, what), path.open("rb") as file:
        first = file.readline(FIRST_LINE)
    if first.strip() and mark not in first:
        message = f"{what} would replace another file; name a new one, or remove it first"
        raise RecipeError([Problem(shown_path(path), message)])


@contextmanager
def writing(path: str | Path, what: str) -> Iterator[None]:
    """Context for writing `what` at `path`: turns file system errors into `RecipeError`s.

    Their messages name both.
    """
    try:
        with _full_disks():
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
            [
                Problem(
                    shown_path(path), f"{what} can't be written: its name contains a NUL character"
                )
            ]
        ) from error


@contextmanager
def _full_disks() -> Iterator[None]:
    """Context that turns safetensors' own error for a write that failed into an `OSError`."""
    try:
        yield
    except Exception as error:
        # By name: to import it for this would load the library in commands that need it not.
        if type(error).__name__ != "SafetensorError" or "I/O error" not in str(error):
            raise
        raise OSError(str(error).rpartition("I/O error: ")[2]) from error


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Context that yields the name of a new file, which takes the place of `path` at its end.

    So whoever reads `path` meets the old content or the new one, and a failure leaves it as it was.
    What is no regular file, such as a pipe, is written as it is.

    Raises `OSError`.
    """
    target = Path(path)
    if target.exists() and not target.is_file():  # its real name, /proc/1/fd/pipe:[2], is no file
        yield target
        return
    if os.path.lexists(target):
        target = Path(os.path.realpath(target))  # a link stays a link
    if os.path.lexists(target) and not (
        target.is_file() and os.access(target, os.W_OK) and os.access(target.parent, os.W_OK)
    ):
        yield target
        return
    written = target.with_name(f".vlm-tune-{secrets.token_hex(8)}{target.suffix[:20]}")
    try:
        yield written
        if target.exists():
            shutil.copymode(target, written)
        written.replace(target)
    except BaseException:
        written.unlink(missing_ok=True)
        raise


def write_whole(path: str | Path, text: str, errors: str = "strict") -> None:
    """Writes a text in UTF-8 as a file that is there whole or not at all.

    Raises `OSError`.
    """
    with replacing(path) as written:
        written.write_text(text, encoding="utf-8", errors=errors)


def reason(error: OSError | UnicodeEncodeError) -> str:
    """Returns a file system error in words, with the file where that helps."""
    if isinstance(error, UnicodeEncodeError):
        return "its name contains half of a surrogate pair"
    text = (error.strerror or str(error) or type(error).__name__).lower()
    if UNFINISHED.fullmatch(text):
        return "the disk is full, or files may not be as large"
    if error.errno in (errno.ENOTDIR, errno.EEXIST) and error.filename:
        above = next(
            (
                each
                for each in (Path(error.filename), *Path(error.filename).parents)
                if each.is_file()
            ),
            None,
        )
        return f"{shown_path(above)} is a file, not a folder" if above else text
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
