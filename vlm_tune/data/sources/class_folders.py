"""Images in one folder a class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from vlm_tune.config.data import FolderSource
from vlm_tune.data.chat.instructions import load_instructions
from vlm_tune.data.sources.base import CHUNK_ROWS, Chunk, checked, digest
from vlm_tune.data.sources.legible import SURROGATE, is_legible
from vlm_tune.data.sources.media import ImageFolder
from vlm_tune.data.sources.video import IMAGE_SUFFIXES
from vlm_tune.data.types import Conversation, References
from vlm_tune.errors import DataError
from vlm_tune.paths import home
from vlm_tune.quoting import escaped, quoted


class ClassFolders:
    """A source that classifies each image of a class's folder, sub-folders included.

    The choices are the names of all class folders.
    """

    form = "classify"

    def __init__(self, config: FolderSource, *, seed: int) -> None:
        """Raises `DataError` for a path that holds no folders."""
        self.name = config.path
        self._seed = seed
        self._root = Path(home(config.path))
        if not self._root.is_dir():
            raise DataError("no such folder", source=self.name)
        self._classes = sorted(
            entry.name
            for entry in os.scandir(self._root)
            if entry.is_dir() and not entry.name.startswith(".")
        )
        unreadable = next(
            (name for name in self._classes if SURROGATE.search(name) or not is_legible(name)), None
        )
        if unreadable is not None:
            raise DataError(
                f"the class folder {quoted(unreadable)} has a name that is no text; rename it",
                source=self.name,
            )
        if not self._classes:
            raise DataError(
                "contains no folders; each class is a folder of images", source=self.name
            )
        self._instructions = load_instructions(config.instructions, self.form)
        self._listed: tuple[str, list[Path]] = ("", [])

    def fingerprint(self) -> str:
        """A hash of the images' names, the instruction set and the seed."""
        listed = (str(path) for name in self._classes for path in _images(self._root / name))
        return digest(self._instructions.model_dump_json(), self._seed, *self._classes, *listed)

    def chunks(self) -> Iterator[Chunk]:
        """Ranges of a class's images. Raises `DataError` for a class without images."""
        number = 0
        first = 1
        for place, name in enumerate(self._classes):
            images = len(_images(self._root / name))
            if not images:
                raise DataError(
                    f"the class {quoted(name)} has no image ({', '.join(IMAGE_SUFFIXES)})",
                    source=self.name,
                )
            for start in range(0, images, CHUNK_ROWS):
                count = min(CHUNK_ROWS, images - start)
                yield Chunk(number, first, count, (place, start))
                number = number + 1
                first = first + count

    def conversations(self, chunk: Chunk) -> Iterator[Conversation | DataError]:
        """Conversations about the chunk's images, in the order of their names."""
        place, start = chunk.payload
        label = self._classes[place]
        values = {"choices": ", ".join(self._classes), "label": label}
        references = References(self.form, choices=tuple(self._classes), chosen=place)
        folder = ImageFolder(self._root)
        if self._listed[0] != label:  # listed once for the many chunks of a large class
            self._listed = (label, _images(self._root / label))
        paths = self._listed[1][start : start + chunk.rows]
        for row, path in enumerate(paths, chunk.first_row):
            inner = path.relative_to(self._root).as_posix()
            row_id = escaped(f"{self._root.name}/{inner}")
            try:
                messages = self._instructions.messages(
                    row_id, (folder.find(inner),), values, seed=self._seed
                )
                yield Conversation(
                    row_id, checked(messages), label, self.name, row, references=references
                )
            except DataError as error:
                yield DataError(error.message, source=self.name, row=row, kind=error.kind)


def _images(folder: Path) -> list[Path]:
    """The image files under a class's folder, sorted."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )
