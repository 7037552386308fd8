"""The reader that turns rows of any container and any form into conversations."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm_tune.config.data import SHARES, DatasetSource, RowsSource
from vlm_tune.data.chat.instructions import WORDED_BY_MEDIUM, load_instructions
from vlm_tune.data.sources.base import Chunk, Container, StoredRow, checked, digest
from vlm_tune.data.sources.chat_schemas import (
    CHAT_FORMS,
    decoded_lists,
    reasoning_of,
    with_system,
)
from vlm_tune.data.sources.few_shot import Shots
from vlm_tune.data.sources.fields import EVERY_FORM, USED, refuse_unused, without
from vlm_tune.data.sources.legible import MAYBE_NULLS, NULLS, SURROGATE
from vlm_tune.data.sources.media import ImageFolder, MediaFinder
from vlm_tune.data.sources.media_places import RowMedia, marked_parts, with_media
from vlm_tune.data.sources.preferences import PREFERENCE_FORMS, Judged, check_differ
from vlm_tune.data.sources.region_fields import BoxOptions, with_regions
from vlm_tune.data.sources.schema_detection import check_columns, detect_form, renamed, usable
from vlm_tune.data.sources.task_schemas import TASK_FORMS, TaskOptions
from vlm_tune.data.types import Conversation, References
from vlm_tune.errors import DataError
from vlm_tune.paths import home
from vlm_tune.quoting import name_list, quoted

NOT_ROWS = {"limit", "template", "system"} | SHARES
"""Options of a source that do not change its rows."""


class RowsReader:
    """A source of rows: the container supplies them, the form defines their meaning."""

    def __init__(self, container: Container, config: RowsSource, *, seed: int) -> None:
        """Detects the form by the first rows, unless configured. Raises `DataError` on failure."""
        self.name = container.name
        self._container = container
        self._config = config
        self._seed = seed
        check_columns(config.columns, self.name)
        self._columns = dict(config.columns)
        self.form: str = config.form
        if config.form == "auto":
            self.form, self._columns = detect_form(self._stored(), config.columns, self.name)
        if config.instructions and self.form not in TASK_FORMS:
            raise DataError(
                f"instructions are for rows of a task; {self.form} rows bring their own words",
                source=self.name,
            )
        if config.shots and self.form == "unpaired_preference":
            raise DataError(
                "shots: an answer of unpaired_preference rows may be a bad one, and no example",
                source=self.name,
            )
        self._instructions = (
            load_instructions(config.instructions or self.form, self.form)
            if self.form in TASK_FORMS
            else None
        )
        self._of_media = (
            {
                kind: load_instructions(f"{self.form}-{kind}", self.form)
                for kind in ("audio", "video")
            }
            if self.form in WORDED_BY_MEDIUM and config.instructions is None
            else {}
        )
        self._finders: dict[Path | None, MediaFinder] = {}
        self._shot_places: Sequence[int] | None = None
        self._shots = Shots(config.shots, seed)
        self._boxes = BoxOptions(config.box_format, config.box_unit)
        self._options = TaskOptions(
            (config.booleans[0], config.booleans[1]),
            config.answer_is,
            seed if config.shuffle_choices else None,
        )

    def __getstate__(self) -> dict[str, Any]:
        """The state without caches: each worker fills its own."""
        return {
            **vars(self),
            "_finders": {},
            "_shots": Shots(self._config.shots, self._seed, self._shot_places),
        }

    def with_shots_from(self, places: Sequence[int]) -> RowsReader:
        """A copy whose few-shot examples are drawn only from the rows at `places` (from 0)."""
        other = copy(self)
        other._shot_places = places
        other._shots = Shots(self._config.shots, self._seed, places)
        return other

    def fingerprint(self) -> str:
        """A hash of the rows, the instruction set, and the options that shape conversations."""
        # A data set's name determines its rows; another source's name is only its label in scores.
        unused = NOT_ROWS if isinstance(self._config, DatasetSource) else NOT_ROWS | {"name"}
        options = self._config.model_dump_json(exclude=unused)
        sets = [self._instructions, *self._of_media.values()] if self._instructions else []
        prompts = "".join(each.model_dump_json() for each in sets if each)
        drawn = self._seed if self._instructions or self._config.shots else ""
        shots = "" if self._shot_places is None else list(self._shot_places)
        return digest(
            self._container.fingerprint(),
            self.form,
            sorted(self._columns.items()),
            options,
            prompts,
            drawn,
            shots,
        )

    def chunks(self) -> Iterator[Chunk]:
        """The container's chunks."""
        return self._container.chunks()

    def conversations(self, chunk: Chunk) -> Iterator[Conversation | DataError]:
        """The chunk's rows in order, with few-shot examples where the source has them."""
        self._shots.fill(self._conversation(stored) for stored in self._stored())
        for stored in self._rows(chunk):
            conversation = self._conversation(stored)
            yield (
                conversation
                if isinstance(conversation, DataError)
                else self._shots.before(conversation)
            )

    def _stored(self) -> Iterator[StoredRow]:
        """All stored rows in order."""
        return (stored for chunk in self._container.chunks() for stored in self._rows(chunk))

    def _rows(self, chunk: Chunk) -> Iterator[StoredRow]:
        """The container's rows, with missing values as None and without ignored fields."""
        for stored in self._container.rows(chunk):
            value = stored.value
            if isinstance(value, dict):
                value = without(value, self._config.ignore) if self._config.ignore else value
                nulls = self._nulls(stored)
                if nulls:
                    value = {
                        name: None if isinstance(cell, str) and cell.strip() in nulls else cell
                        for name, cell in value.items()
                    }
            yield stored if value is stored.value else replace(stored, value=value)

    def _nulls(self, stored: StoredRow) -> Collection[str]:
        """The texts that mean a missing value in this row's container."""
        if self._config.null_values is not None:
            return self._config.null_values
        return NULLS if stored.untyped else ()

    def _conversation(self, stored: StoredRow) -> Conversation | DataError:
        try:
            row = self._fields(stored)
            row_id = f"{stored.label}:{self._id(row, stored)}:{stored.number}"
            finder = self._finder(stored.folder)
            judged, references = self._read(row_id, row, finder)
            judged = _with_regions(_with_reasoning(judged, row), row, self._boxes)
            messages = judged.messages
            category = row.get("category")
            if category is None and self.form == "classify":
                category = messages[-1].text
            category = str(category) if isinstance(category, str | int) else ""
            if SURROGATE.search(category):
                raise DataError(
                    f"`category` {quoted(category)} contains half of a surrogate pair, which is "
                    "not a character",
                    kind="text",
                )
            return Conversation(
                row_id,
                checked(messages),
                category,
                stored.source,
                stored.number,
                references=references,
                rejected=judged.rejected,
                desirable=judged.desirable,
            )
        except DataError as error:
            missing = [
                name
                for name in self._columns.values()
                if isinstance(stored.value, dict) and name not in stored.value
            ]
            hint = f" (columns: the row has no {name_list(missing)})" if missing else ""
            return DataError(
                error.message + hint,
                source=stored.source,
                row=stored.number,
                kind=error.kind,
                content=stored.value,
                file=error.file,
            )

    def _read(
        self, row_id: str, row: dict[str, Any], finder: MediaFinder
    ) -> tuple[Judged, References]:
        """The turns of a row by its form, and what scores need of it."""
        if self._instructions:
            return self._task(row_id, row, finder)
        if self.form in PREFERENCE_FORMS:
            return PREFERENCE_FORMS[self.form](row, finder), References(self.form)
        return Judged(CHAT_FORMS[self.form](row, finder)), References(self.form)

    def _fields(self, stored: StoredRow) -> dict[str, Any]:
        """The row by our field names.

        Raises `DataError` for a field that is used but unreadable or ambiguous, and for one that
        carries meaning but is not used.
        """
        row = renamed(usable(stored.value), self._columns)
        used = USED[self.form] | EVERY_FORM
        for name in used & row.keys():
            value = row[name]
            if isinstance(value, DataError):
                raise DataError(f"`{name}`: {value.message}", kind=value.kind)
            if (
                stored.untyped
                and self._config.null_values is None
                and isinstance(value, str)
                and value.strip() in MAYBE_NULLS
            ):
                message = (
                    f"`{name}` is {quoted(value)}, a text or a missing value: "
                    "say which with the source's `null_values`"
                )
                raise DataError(message, kind="ambiguous")
        row = decoded_lists(
            {name: value for name, value in row.items() if not isinstance(value, DataError)}
        )
        refuse_unused(
            row,
            self.form,
            task=self._instructions is not None,
            detected=self._config.form == "auto",
        )
        return row

    @staticmethod
    def _id(row: dict[str, Any], stored: StoredRow) -> str | int:
        identifier = row.get("id")
        if not isinstance(identifier, str | int):
            return stored.number
        if isinstance(identifier, str) and SURROGATE.search(identifier):
            raise DataError(
                f"`id` {quoted(identifier)} contains half of a surrogate pair, which is not a "
                "character",
                kind="text",
            )
        return identifier

    def _task(
        self, row_id: str, row: dict[str, Any], finder: MediaFinder
    ) -> tuple[Judged, References]:
        """The turns of a task row, in the words of its instruction set, and what scores need of it.

        A row of `match` has its other answer as the rejected one.

        `<image>` marks in its fields or in the instruction set are replaced by its images.
        """
        assert self._instructions is not None
        fields = TASK_FORMS[self.form](row, row_id, self._options)
        media = RowMedia(row, finder)
        if not any(media.items.values()):
            raise DataError("no image, video or audio", kind="image_count")
        words = next(
            (words for kind, words in self._of_media.items() if media.items[kind]),
            self._instructions,
        )
        question, answer = words.texts(row_id, fields.values, seed=self._seed)
        messages = with_media(words.turns(marked_parts(question, media), answer), media)
        answers = (words.answer.format_map(fields.values | each) for each in fields.alternatives)
        references = References(self.form, tuple(answers), fields.choices, fields.chosen)
        rejected = (
            words.turns((), words.answer.format(answer=fields.choices[1]))
            if self.form == "match"
            else [None]
        )
        return Judged(with_system(row, messages), rejected[-1]), references

    def _finder(self, folder: Path | None) -> MediaFinder:
        """The cached `MediaFinder` for rows of a file in `folder`."""
        root = Path(home(self._config.image_root)) if self._config.image_root else folder
        finder = self._finders.get(root)
        if finder is None:
            images = ImageFolder(root) if root else None
            finder = self._finders[root] = MediaFinder(
                images, self._config.video_frames, self._config.video_fps
            )
        return finder


def _with_reasoning(judged: Judged, row: dict[str, Any]) -> Judged:
    """The turns of a row with the reasoning that it has in a field, before the last answer."""
    reasoning = reasoning_of(row)
    if not reasoning or not judged.messages:
        return judged
    *before, answer = judged.messages
    if answer.reasoning:
        raise DataError("reasoning in a field of the row, and in its last turn", kind="field")
    return replace(judged, messages=[*before, replace(answer, reasoning=reasoning)])


def _with_regions(judged: Judged, row: dict[str, Any], options: BoxOptions) -> Judged:
    """The turns of a row with its boxes and points in place of their marks."""
    rejected = [] if judged.rejected is None else [judged.rejected]
    replaced = with_regions([*judged.messages, *rejected], row, options)
    if not rejected:
        return replace(judged, messages=replaced)
    check_differ(replaced[-2], replaced[-1])
    return replace(judged, messages=replaced[:-1], rejected=replaced[-1])
