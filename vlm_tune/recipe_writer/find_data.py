"""Finds the sources of a recipe at the paths that a user names.

It decides by names which reader and which part a path is for; what a row looks like is left to the
readers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vlm_tune.data.audio.decode import AUDIO_SUFFIXES
from vlm_tune.data.sources.columnar import SAVED
from vlm_tune.data.sources.file_rows import find_files
from vlm_tune.data.sources.registry import FORMATS, SHARDS
from vlm_tune.data.sources.stored_files import unpacked_name
from vlm_tune.data.sources.video import IMAGE_SUFFIXES
from vlm_tune.errors import DataError
from vlm_tune.paths import home, is_folder
from vlm_tune.quoting import name_list

PARTS = ("train", "validation", "test")
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
"""Words in the name of a file, folder or split that say which part it is."""
PART_WORDS = {word for words in WORDS.values() for word in words}
MANY = 4
"""Files of rows of one kind in a folder from which on a pattern names them."""

Sources = dict[str, list[dict[str, Any]]]
"""By part, sources as a recipe writes them."""


def find_data(paths: Sequence[str]) -> Sources:
    """Finds the sources of each part.

    Args:
        paths: files, patterns of files, or folders. Beside one file of a train part, those of the
            other parts are looked for.

    Returns:
        The sources by part; `train` has at least one.

    Raises:
        DataError: a path does not exist, or holds nothing to train on.
    """
    sources: Sources = {part: [] for part in PARTS}
    for path in paths:
        for part, source in _at(path):
            sources[part].append(source)
    if len(paths) == 1 and not sources["validation"] and not sources["test"]:
        for part in ("validation", "test"):
            sources[part] = _beside(paths[0], part)
    if not sources["train"]:
        raise DataError(
            f"holds no rows to train on, only the parts {name_list(_present(sources))}; name a "
            "file without these words too",
            source=paths[0],
        )
    return sources


def part_of(name: str) -> str:
    """The part that a file's or folder's name says it is; `train` where it says nothing."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    return next((part for part in ("validation", "test") if words & set(WORDS[part])), "train")


def _present(sources: Sources) -> Iterable[str]:
    return (part for part in PARTS if sources[part])


def _at(path: str) -> list[tuple[str, dict[str, Any]]]:
    """The sources at one path, each with its part."""
    if not is_folder(home(path)):
        if not is_there(path):
            raise DataError("no such file or folder", source=path)
        return [(part_of(Path(path).name), file_source(path))]
    folder = Path(home(path))
    saved = _saved_data_set(path, folder)
    if saved:
        return saved
    files = sorted(each for each in folder.iterdir() if each.is_file() and _holds_rows(each))
    return _row_files(path, files) if files else _class_folders(path, folder)


def _row_files(path: str, files: list[Path]) -> list[tuple[str, dict[str, Any]]]:
    """The files of rows in a folder; many of one kind, all of one part, become a pattern."""
    parts = {part_of(each.name) for each in files}
    endings = {
        next((shard for shard in SHARDS if each.name.endswith(shard)), each.suffix)
        for each in files
    }
    if len(files) >= MANY and len(parts) == len(endings) == 1:
        return [("train", file_source(str(Path(path) / f"*{endings.pop()}")))]
    return _together(
        [(part_of(each.name), file_source(str(Path(path) / each.name))) for each in files]
    )


def _together(
    sources: list[tuple[str, dict[str, Any]]],
) -> list[tuple[str, dict[str, Any]]]:
    """The sources; where none is called after another part, all are of one."""
    return (
        sources
        if any(part == "train" for part, _ in sources)
        else [("train", source) for _, source in sources]
    )


def _holds_rows(file: Path) -> bool:
    name = unpacked_name(file).name.lower()
    return not name.startswith(".") and (Path(name).suffix in FORMATS or file.name.endswith(SHARDS))


def file_source(path: str) -> dict[str, Any]:
    """The source of a file of rows, or of tar shards."""
    kind = "webdataset" if path.endswith(SHARDS) else "file"
    return {"kind": kind, "path": path}


def _saved_data_set(path: str, folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """The splits of a data set that the datasets library saved to this folder."""
    if not any((folder / name).is_file() for name in SAVED):
        return []
    if not (folder / "dataset_dict.json").is_file():
        return [("train", {"kind": "dataset", "name": path})]
    splits = sorted(each.name for each in folder.iterdir() if (each / "state.json").is_file())
    return _together(
        [(part_of(name), {"kind": "dataset", "name": path, "split": name}) for name in splits]
    )


def _class_folders(path: str, folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Images in one folder a class, or in such folders for each part."""
    inner = sorted(each for each in folder.iterdir() if each.is_dir() and each.name[0] != ".")
    parts = [
        (part_of(each.name), {"kind": "folder", "path": str(Path(path) / each.name)})
        for each in inner
        if each.name.lower() in PART_WORDS
        and any(has_images(child) for child in each.iterdir() if child.is_dir())
    ]
    if any(part == "train" for part, _ in parts):
        return parts
    if any(has_images(each) for each in inner):
        return [("train", {"kind": "folder", "path": path})]
    loose = any(each.suffix.lower() in IMAGE_SUFFIXES for each in folder.iterdir())
    message = (
        "holds images and nothing that says what to learn about them: add a file of rows "
        "(.jsonl, .json, .csv, .parquet, ...), or put them in one folder a class"
        if loose
        else "no images: expected a file of rows, tar shards, a data set saved to disk, or "
        "images in one folder a class"
    )
    raise DataError(message, source=path)


def is_there(path: str) -> bool:
    """Whether there is a file at a path, or any that matches a pattern."""
    try:
        find_files(path)
    except DataError:
        return False
    return True


def has_images(folder: Path) -> bool:
    """Whether an image lies in a folder or below it."""
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.rglob("*"))


def has_media(folder: Path) -> bool:
    """Whether an image or a clip of audio lies in a folder or below it."""
    suffixes = IMAGE_SUFFIXES + AUDIO_SUFFIXES
    return any(path.suffix.lower() in suffixes for path in folder.rglob("*"))


def _beside(path: str, part: str) -> list[dict[str, Any]]:
    """The source of another part beside a file called after its train part."""
    if is_folder(home(path)):
        return []
    for word in WORDS[part]:
        name = re.sub(
            r"(?<![A-Za-z])train(?:ing)?(?![A-Za-z])", word, Path(path).name, flags=re.IGNORECASE
        )
        other = str(Path(path).with_name(name))
        if name != Path(path).name and is_there(other):
            return [file_source(other)]
    return []
