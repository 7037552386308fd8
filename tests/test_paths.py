"""Places that can't be written are named before any work is done.

Trying them leaves nothing behind.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tests.helpers.tiny_models import cli, parsed
from vlm_tune.api import sft
from vlm_tune.errors import RecipeError, VlmTuneError
from vlm_tune.paths import ANSWERS, check_writable, shown_path, write_whole, writing


def everything(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize("folder", [True, False])
def test_a_place_that_can_be_written_is_left_as_it_was(folder: bool, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "answers.jsonl").write_text("kept")
    before = everything(tmp_path)
    for path in (tmp_path / "new" / "deep" / "x", tmp_path / "there" / "x", tmp_path / ("é" * 100)):
        check_writable(path, "the output", folder=folder)
    check_writable(tmp_path / "there", "the output", folder=True)
    check_writable(tmp_path / "there" / "answers.jsonl", "the answers' file")
    assert (
        everything(tmp_path) == before
        and (tmp_path / "there" / "answers.jsonl").read_text() == "kept"
    )


@pytest.mark.parametrize("folder", [True, False])
def test_processes_that_try_and_use_one_place_at_once_do_not_disturb_each_other(
    folder: bool, tmp_path: Path
) -> None:
    """As the ranks of a launch do, which look whether the cache can be written and then use it."""

    def use_often(_: int) -> None:
        for number in range(200):
            path = tmp_path / f"new-{number}" / "deep" / "x"
            check_writable(path, "the cache", folder=folder)
            path.parent.mkdir(parents=True, exist_ok=True)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(use_often, range(4)))
    assert not any(path.is_file() for path in everything(tmp_path))
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("file/run", "is a file, not a folder"),
        ("file/deep/run", "is a file, not a folder"),
        ("n" * 300, "file name too long"),
        ("n" * 300 + "/run", "file name too long"),
        ("a\0b", "NUL"),
        ("a\ud83d", "surrogate"),
        ("/proc/run", "no such file"),
        ("/proc/run/deep", "no such file"),
        ("loop/run", "symbolic link"),
    ],
)
def test_one_that_can_not_is_refused_with_the_reason(
    path: str, reason: str, folder: bool, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    before = everything(tmp_path)
    with pytest.raises(
        RecipeError, match=f"(?s)the output can't be written: .*{reason}"
    ) as refused:
        check_writable(tmp_path / path, "the output", folder=folder)
    assert refused.value.exit_code == 2 and len(str(refused.value)) < 800
    str(refused.value).encode()
    assert everything(tmp_path) == before


def test_a_folder_is_no_file_and_a_file_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a directory"):
        check_writable(tmp_path, "the page")
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="is a file, not a folder"):
        check_writable(tmp_path / "file", "the output", folder=True)


def test_a_file_system_that_refuses_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def refuse(path: str, flags: int, *arguments: int, **options: int | None) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real_open(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(RecipeError, match="read-only file system"):
        check_writable(tmp_path / "run", "the output", folder=True)
    assert not everything(tmp_path)


def test_faults_that_are_no_file_systems_go_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="something else"), writing(tmp_path, "the output"):
        raise ValueError("something else")
    with pytest.raises(RecipeError, match="make room"), writing(tmp_path, "the merged model"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_paths_are_shown_without_control_characters_and_cut() -> None:
    assert shown_path("a\x1b[31m\0b\ud83d") == "a\\x1b[31m\\x00b\\ud83d"
    assert len(shown_path("n" * 5000)) <= 200


def test_an_output_replaces_its_own_kind_alone(color_rows: Path, tmp_path: Path) -> None:
    rows = color_rows.read_bytes()
    for what, mark in (("the page", b"<!doctype html>"), ("the file of answers", ANSWERS)):
        with pytest.raises(RecipeError, match=f"{what} would replace another file"):
            check_writable(color_rows, what, mark=mark)
    assert color_rows.read_bytes() == rows
    earlier = {
        "page.html": (b"<!doctype html>\n<html>", b"<!doctype html>"),
        "answers.jsonl": (b'{"id": "1", "expected": "red"}\n', ANSWERS),
    }
    for name, (content, mark) in earlier.items():
        (tmp_path / name).write_bytes(content)
        check_writable(tmp_path / name, "it", mark=mark)
    (tmp_path / "empty").write_bytes(b"\n")
    for place in ("empty", "new"):
        check_writable(tmp_path / place, "it", mark=ANSWERS)


def test_check_does_not_write_its_page_over_the_data(
    tiny_recipe: Callable[..., str], color_rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(tiny_recipe("causal"))
    rows = color_rows.read_bytes()
    cli("check", str(tmp_path / "recipe.yaml"), "--html", str(color_rows), code=2)
    assert color_rows.read_bytes() == rows
    page = tmp_path / "page.html"
    for _ in range(2):
        cli(
            "check", str(tmp_path / "recipe.yaml"), "--html", str(page), code=3
        )  # the rows that are scored are trained on
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("length", [300, 5000])
@pytest.mark.parametrize(
    "changes",
    [
        {"model__llm__name": "", "model__llm__scratch": None},
        {"model__tower": {"kind": "transformers", "name": ""}},
        {"model__tower": {"kind": "open_clip", "name": "ViT-B-32", "pretrained": "/"}},
        {"model__connector__weights": ""},
        {"model__connector__weights": "/"},
    ],
    ids=["llm", "tower", "open_clip", "connector", "connector-path"],
)
def test_a_name_that_no_file_can_have_is_an_error_of_ours(
    tiny_recipe: Callable[..., str], changes: dict[str, Any], length: int
) -> None:
    def lengthened(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: lengthened(each) for key, each in value.items()}
        return value + "x" * length if value in ("", "/") else value

    recipe = parsed(tiny_recipe("causal"), **lengthened(changes))
    with pytest.raises(VlmTuneError) as caught:
        sft(recipe)
    assert len(str(caught.value)) < 1000


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """Context in which no file can be larger than `most` bytes, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_a_file_that_can_not_be_written_whole_stays_as_it_was(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    too_large = pytest.raises(RecipeError, match="the page can't be written: file too large")
    with too_large, small_files(1000), writing(page, "the page"):
        write_whole(page, "x" * 5000)
    assert everything(tmp_path) == []
    page.write_text("old")
    page.chmod(0o640)
    with pytest.raises(OSError, match="too large"), small_files(1000):
        write_whole(page, "x" * 5000)
    assert everything(tmp_path) == [page] and page.read_text() == "old"
    write_whole(page, "new")
    assert page.read_text() == "new" and page.stat().st_mode & 0o777 == 0o640


def test_a_link_stays_a_link_and_what_is_no_file_is_written_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("page.html")
    write_whole(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "page.html").read_text() == "text"
    write_whole("/dev/null", "text")
    # A link to a pipe, as /dev/stdout and a shell's >(...) are, leads to a name that is no file.
    reads, writes = os.pipe()
    write_whole(f"/dev/fd/{writes}", "text")
    assert os.read(reads, 10) == b"text"
    os.close(reads)
    os.close(writes)
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("library", ["safetensors", "numpy"])
def test_a_librarys_words_for_a_full_disk_are_ours(library: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    with pytest.raises(RecipeError) as refused, small_files(1000), writing(path, "the model"):
        if library == "numpy":
            with path.open("wb") as file:
                np.zeros(10_000).tofile(file)
        else:
            save_file({"weight": torch.zeros(10_000)}, path)
    assert "model: the model can't be written: " in str(refused.value)
    words = {"safetensors": "file too large", "numpy": "the disk is full, or files may not be"}
    assert words[library] in str(refused.value)


def test_errors_of_reading_weights_are_not_taken_for_those_of_writing(tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(SafetensorError), writing(tmp_path, "the model"):
        load_file(tmp_path / "cut.safetensors")
