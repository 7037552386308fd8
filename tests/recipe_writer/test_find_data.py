"""Which sources and parts are seen at the paths that a user names."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm_tune.errors import DataError
from vlm_tune.recipe_writer.find_data import find_data, part_of


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def places(folder: Path, *paths: str) -> dict[str, list[str]]:
    """By part, the kind and the place of each source, relative to the folder."""
    sources = find_data([str(folder / path) for path in paths])
    return {
        part: [
            f"{each['kind']} {Path(each.get('path', each.get('name'))).relative_to(folder)}"
            + (f" {each['split']}" if "split" in each else "")
            for each in sources[part]
        ]
        for part in sources
        if sources[part]
    }


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("train.jsonl", "train"),
        ("rows.json", "train"),
        ("vqa_val_2014.json", "validation"),
        ("Dev.csv", "validation"),
        ("valid-00001.parquet", "validation"),
        ("test.jsonl.gz", "test"),
        ("contest.json", "train"),
        ("values.csv", "train"),
    ],
)
def test_a_part_is_a_word_of_the_name(name: str, part: str) -> None:
    assert part_of(name) == part


def test_files_beside_a_train_file_are_its_other_parts(tmp_path: Path) -> None:
    touch(tmp_path, "vqa_train.jsonl", "vqa_dev.jsonl", "vqa_test.jsonl", "other_val.jsonl")
    assert places(tmp_path, "vqa_train.jsonl") == {
        "train": ["file vqa_train.jsonl"],
        "validation": ["file vqa_dev.jsonl"],
        "test": ["file vqa_test.jsonl"],
    }
    assert places(tmp_path, "vqa_train.jsonl", "other_val.jsonl") == {
        "train": ["file vqa_train.jsonl"],
        "validation": ["file other_val.jsonl"],
    }


def test_a_folder_holds_rows_shards_splits_or_classes(tmp_path: Path) -> None:
    touch(tmp_path, "rows/train.csv", "rows/val.csv", "rows/a.png", "rows/notes.txt")
    assert places(tmp_path, "rows") == {
        "train": ["file rows/train.csv"],
        "validation": ["file rows/val.csv"],
    }
    touch(tmp_path, *(f"shards/{number:04}.tar" for number in range(6)))
    assert places(tmp_path, "shards") == {"train": ["webdataset shards/*.tar"]}
    touch(tmp_path, "saved/dataset_dict.json", "saved/train/state.json", "saved/test/state.json")
    assert places(tmp_path, "saved") == {
        "train": ["dataset saved train"],
        "test": ["dataset saved test"],
    }
    touch(tmp_path, "parts/train/cat/1.png", "parts/train/dog/1.png", "parts/val/cat/2.png")
    assert places(tmp_path, "parts") == {
        "train": ["folder parts/train"],
        "validation": ["folder parts/val"],
    }
    touch(tmp_path, "classes/cat/1.JPG", "classes/dog/1.png")
    assert places(tmp_path, "classes") == {"train": ["folder classes"]}


def test_a_file_called_test_alone_is_trained_on_only_in_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, "only/test.jsonl")
    assert places(tmp_path, "only") == {"train": ["file only/test.jsonl"]}
    with pytest.raises(DataError, match="only the parts test"):
        find_data([str(tmp_path / "only" / "test.jsonl")])


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tar.xz", "tgz"])
def test_many_shards_become_one_pattern_of_shards(ending: str, tmp_path: Path) -> None:
    touch(tmp_path, *(f"rows-{number}.{ending}" for number in range(12)))
    assert places(tmp_path, ".") == {"train": [f"webdataset *.{ending}"]}
