"""Places that can't be written are named before any work is done, and trying them leaves nothing behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vlm_tune.errors import RecipeError
from vlm_tune.paths import check_writable, shown_path, writing


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
    assert everything(tmp_path) == before and (tmp_path / "there" / "answers.jsonl").read_text() == "kept"


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("file/run", "is a file, and no folder"),
        ("file/deep/run", "is a file, and no folder"),
        ("n" * 300, "file name too long"),
        ("n" * 300 + "/run", "file name too long"),
        ("a\0b", "NUL"),
        ("a\ud83d", "surrogate"),
        ("/proc/run", "no such file"),
        ("/proc/run/deep", "no such file"),
        ("loop/run", "symbolic link"),
    ],
)
def test_one_that_can_not_is_refused_with_the_reason(path: str, said: str, folder: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    before = everything(tmp_path)
    with pytest.raises(RecipeError, match=f"(?s)the output can't be written: .*{said}") as refused:
        check_writable(tmp_path / path, "the output", folder=folder)
    assert refused.value.exit_code == 2 and len(str(refused.value)) < 800
    str(refused.value).encode()
    assert everything(tmp_path) == before


def test_a_folder_is_no_file_and_a_file_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a directory"):
        check_writable(tmp_path, "the page")
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="is a file, and no folder"):
        check_writable(tmp_path / "file", "the output", folder=True)


def test_a_file_system_that_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

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
