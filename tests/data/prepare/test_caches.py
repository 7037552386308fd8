"""The contents of a cache are checked whenever it is opened.

Damage is noticed and made anew, never used, and never a traceback.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.chat_samples import processor
from tests.helpers.forked_runs import ended, start
from tests.helpers.tiny_models import built, examples_of, parsed, rows_of
from vlm_tune.api import sft
from vlm_tune.cli import main
from vlm_tune.data.prepare.run import prepare
from vlm_tune.data.prepare.worker import ShardMaker
from vlm_tune.data.types import distinct_media
from vlm_tune.errors import RecipeError
from vlm_tune.files import file_checksum, is_intact, write_checksums
from vlm_tune.model.feature_cache import tower_features
from vlm_tune.resources import cache_folder


def flip(path: Path) -> None:
    """One bit, in the middle; the time of change as it was."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def test_a_folder_is_intact_only_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(bytes(3_000_000))
    (tmp_path / "two").write_bytes(b"")
    assert not is_intact(tmp_path) and file_checksum(tmp_path / "one") != file_checksum(
        tmp_path / "two"
    )
    write_checksums(tmp_path)
    assert is_intact(tmp_path)
    (tmp_path / "three").touch()
    assert not is_intact(tmp_path)


@pytest.mark.parametrize("damage", [flip, cut, empty, remove])
def test_damaged_prepared_rows_are_prepared_anew(
    damage: Callable[[Path], None], tiny_recipe: Callable[..., str]
) -> None:
    recipe, chat_processor = parsed(tiny_recipe("causal")), processor("chatml", "bytes", "causal")
    notes: list[str] = []

    def read() -> Any:
        return prepare(recipe.data, recipe.data.train, chat_processor, seed=0, note=notes.append)

    first = read()
    expected = [
        (example.id, example.input_ids.tolist(), example.labels.tolist())
        for example in examples_of(first)
    ]
    names = sorted(path.name for path in first.folder.iterdir())
    assert {"checksums.json", "examples.arrow", "media.arrow", "rows.arrow", "units.npz"} <= set(
        names
    )
    for number, name in enumerate(names):
        if name == "media.bin":  # empty here
            continue
        damage(first.folder / name)
        again = read()
        assert [
            (e.id, e.input_ids.tolist(), e.labels.tolist()) for e in examples_of(again)
        ] == expected, name
        assert (
            len(notes) == number + 1 - ("media.bin" in names[:number])
            and "damaged" in notes[-1]
            and str(first.folder) in notes[-1]
        )
    before = len(notes)
    read()
    assert len(notes) == before


def test_a_shard_that_was_damaged_while_preparing_was_stopped_is_made_again(
    tiny_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, chat_processor = parsed(tiny_recipe("causal")), processor("chatml", "bytes", "causal")
    expected = [
        example.input_ids.tolist()
        for example in examples_of(prepare(recipe.data, recipe.data.train, chat_processor, seed=0))
    ]
    with monkeypatch.context() as patched:
        patched.setattr(
            "vlm_tune.data.prepare.run.finish",
            lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            prepare(recipe.data, recipe.data.train, chat_processor, seed=1)
    (shard,) = cache_folder("prepared").glob("*.partial/0000-*")
    flip(shard / "examples.arrow")
    written: list[Any] = []
    plain = ShardMaker._write
    monkeypatch.setattr(
        ShardMaker,
        "_write",
        lambda self, *arguments: (written.append(1), plain(self, *arguments))[1],
    )
    again = prepare(recipe.data, recipe.data.train, chat_processor, seed=1)
    assert [example.input_ids.tolist() for example in examples_of(again)] == expected and len(
        written
    ) == 1


@pytest.mark.parametrize("damage", [flip, cut, empty])
def test_damaged_features_are_computed_anew(
    damage: Callable[[Path], None], tiny_recipe: Callable[..., str]
) -> None:
    recipe = parsed(tiny_recipe("causal"))
    model = built(recipe)
    media, notes = distinct_media(rows_of(recipe)), []
    expected = tower_features(model, media)(media[0]).clone()
    (path,) = cache_folder("features").glob("*.npy")
    damage(path)
    assert tower_features(model, media, note=notes.append)(media[0]).equal(expected)
    assert len(notes) == 1 and str(path) in notes[0]
    assert (
        tower_features(model, media, note=notes.append)(media[0]).equal(expected)
        and len(notes) == 1
    )
    assert list(cache_folder("features").glob("*.npy")) == [path]


def test_a_run_over_damaged_caches_says_so_and_goes_on(tiny_recipe: Callable[..., str]) -> None:
    recipe = parsed(tiny_recipe("causal"), train__steps=1, evaluate__samples=0)
    sft(recipe)
    for path in cache_folder("prepared").glob("*/examples.arrow"):
        flip(path)
    for path in cache_folder("features").glob("*.npy"):
        cut(path)
    folder = sft(recipe, overwrite=True).folder
    lines = (folder / "log.jsonl").read_text().splitlines()
    notes = [event["text"] for event in map(json.loads, lines) if event["event"] == "note"]
    assert (
        sum("prepared again" in note for note in notes) == 2
        and sum("computed again" in note for note in notes) == 1
        and sum("the tower's features are cached: no step runs the tower" in n for n in notes) == 1
    )


def test_a_cache_that_cannot_be_written_is_told_by_name_before_the_work(
    tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(
        "vlm_tune.data.prepare.run._make_shards",
        lambda *arguments, **more: pytest.fail("it was begun"),
    )
    with pytest.raises(RecipeError, match=r"VLM_TUNE_CACHE.*can't be written"):
        sft(parsed(tiny_recipe("causal")))


def test_a_full_disk_is_told_with_the_caches_name(
    tiny_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(tiny_recipe("causal"))
    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "cache"))

    def act() -> None:
        sys.argv = ["vlm-tune", "check", str(path)]
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        main()

    assert ended(start(act, tmp_path / "said")) == [2]
    output = (tmp_path / "said.0").read_text()
    assert (
        "the cache folder (VLM_TUNE_CACHE) is full" in output
        and str(tmp_path / "cache") in output
        and "Traceback" not in output
    )
