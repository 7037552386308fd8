"""Rows of any container and any form as conversations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_tune.config import DatasetSource, RowsSource
from vlm_tune.data.instructions import load_instructions
from vlm_tune.data.sources.detect import check_columns, detect_form, renamed, usable
from vlm_tune.data.sources.forms import CHAT_FORMS, RowMedia, decoded_lists
from vlm_tune.data.sources.media import ImageFolder, MediaFinder
from vlm_tune.data.sources.rows import Chunk, Container, StoredRow, checked, digest
from vlm_tune.data.sources.shots import Shots
from vlm_tune.data.sources.tasks import TASK_FORMS
from vlm_tune.data.types import Conversation, Message
from vlm_tune.errors import DataError

NOT_ROWS = {"limit", "weight", "count", "template", "system"}
"""What a source can be told that does not change its rows."""


class RowsReader:
    """A source of rows: a container gives them, a form says what they mean."""

    def __init__(self, container: Container, config: RowsSource, *, seed: int) -> None:
        """Looks at the first rows to tell their form. Raises `DataError` where it can't."""
        self.name, self._container, self._config, self._seed = container.name, container, config, seed
        check_columns(config.columns, self.name)
        self._columns = dict(config.columns)
        self.form: str = config.form
        if config.form == "auto":
            self.form, self._columns = detect_form(self._stored(), config.columns, self.name)
        if config.instructions and self.form in CHAT_FORMS:
            raise DataError(f"instructions are for rows of a task; {self.form} rows bring their own words", source=self.name)
        self._instructions = load_instructions(config.instructions or self.form, self.form) if self.form in TASK_FORMS else None
        self._finders: dict[Path | None, MediaFinder] = {}
        self._shots = Shots(config.shots, seed)

    def __getstate__(self) -> dict[str, Any]:
        """A worker fills its own caches."""
        return {**vars(self), "_finders": {}, "_shots": Shots(self._config.shots, self._seed)}

    def fingerprint(self) -> str:
        """Of the stored rows, the options that shape conversations, and the prompt set."""
        # A data set's name says which rows it has; another source's is only what scores call it.
        unused = NOT_ROWS if isinstance(self._config, DatasetSource) else NOT_ROWS | {"name"}
        options = self._config.model_dump_json(exclude=unused)
        prompts = self._instructions.model_dump_json() if self._instructions else ""
        drawn = self._seed if self._instructions or self._config.shots else ""
        return digest(self._container.fingerprint(), self.form, sorted(self._columns.items()), options, prompts, drawn)

    def chunks(self) -> Iterator[Chunk]:
        """The container's chunks."""
        return self._container.chunks()

    def conversations(self, chunk: Chunk) -> Iterator[Conversation | DataError]:
        """The chunk's rows in order."""
        self._shots.fill(self._conversation(stored) for stored in self._stored())
        for stored in self._container.rows(chunk):
            found = self._conversation(stored)
            yield found if isinstance(found, DataError) else self._shots.before(found)

    def _stored(self) -> Iterator[StoredRow]:
        """All rows from the first on."""
        return (stored for chunk in self._container.chunks() for stored in self._container.rows(chunk))

    def _conversation(self, stored: StoredRow) -> Conversation | DataError:
        try:
            row = decoded_lists(renamed(usable(stored.value), self._columns))
            given = row.get("id")
            row_id = f"{stored.label}:{given if isinstance(given, str | int) else stored.number}:{stored.number}"
            finder = self._finder(stored.folder)
            messages = self._task(row_id, row, finder) if self._instructions else CHAT_FORMS[self.form](row, finder)
            category = row.get("category")
            if category is None and self.form == "classify":
                category = messages[-1].text
            category = str(category) if isinstance(category, str | int) else ""
            return Conversation(row_id, checked(messages), category, stored.source, stored.number)
        except DataError as error:
            missing = [name for name in self._columns.values() if isinstance(stored.value, dict) and name not in stored.value]
            hint = f" (columns: the row has no {', '.join(missing)})" if missing else ""
            return DataError(error.message + hint, source=stored.source, row=stored.number, kind=error.kind, content=stored.value)

    def _task(self, row_id: str, row: dict[str, Any], finder: MediaFinder) -> list[Message]:
        """A task row in the words of its prompt set."""
        assert self._instructions is not None
        values = TASK_FORMS[self.form](row)
        media = RowMedia(row, finder).rest("places")
        if not media:
            raise DataError("no image", kind="image_count")
        return self._instructions.messages(row_id, media, values, seed=self._seed)

    def _finder(self, folder: Path | None) -> MediaFinder:
        """What finds images for rows of a folder's file."""
        root = Path(self._config.image_root) if self._config.image_root else folder
        found = self._finders.get(root)
        if found is None:
            images = ImageFolder(root) if root else None
            found = self._finders[root] = MediaFinder(images, self._config.video_frames, self._config.video_fps)
        return found
