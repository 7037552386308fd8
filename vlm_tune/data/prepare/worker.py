"""Converts a chunk of a source to a shard: its rows' examples, row records and image properties."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_tune.config.data import DataSection
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.chat.truncation import Fitted, fit, length
from vlm_tune.data.prepare.arrow_store import (
    BLOB,
    MediaRow,
    example_batch,
    media_batch,
    write_batches,
)
from vlm_tune.data.prepare.duplicates import ImageInfo, inspect_media
from vlm_tune.data.prepare.language import language_of
from vlm_tune.data.prepare.media_table import MediaTable, file_stamp
from vlm_tune.data.regions import regions_of
from vlm_tune.data.sources.base import Chunk, SourceReader
from vlm_tune.data.types import Conversation, Example, Media, Message
from vlm_tune.errors import DataError
from vlm_tune.files import is_intact, write_checksums
from vlm_tune.quoting import quoted

if TYPE_CHECKING:
    import pyarrow as pa

OK = 0
BAD = 1
LEFT_OUT = 2
"""The status of a row: it has examples, it is unusable, or a rule of the recipe leaves it out."""

KNOWN_IMAGES = 200_000
"""Images whose inspection a worker caches; rows that share an image are often far apart."""

CONTENT = 10_000
"""The number of characters stored of an unusable row."""


@dataclass
class RowRecord:
    """The record of one row.

    `longest` is the length of its longest example before it is dropped, split or trimmed, `tokens`
    the number of tokens of all that is left. `controls` names control tokens that its texts contain
    as plain text. `content` is the beginning of an unusable row, as it was read. `prompt` is the
    length of its prompt in scoring, for rows over `max_length` (else 0). `digest` is `content_hash`
    of the row. `regions` is its number of boxes and points.
    """

    row: int
    source: str
    id: str = ""
    status: int = OK
    kind: str = ""
    message: str = ""
    category: str = ""
    text: int = 0
    images: list[int] = field(default_factory=list)
    longest: int = 0
    tokens: int = 0
    supervised: int = 0
    examples: int = 0
    overlong: int = 0
    controls: str = ""
    content: str = ""
    prompt: int = 0
    digest: int = 0
    regions: int = 0


@dataclass(frozen=True)
class ShardSummary:
    """Summary of a shard, for the process that requested it."""

    folder: Path
    rows: int
    bad: tuple[str, int, str, str] | None
    """Source, row, kind and message of the first unusable row."""


def text_hash(conversation: Conversation) -> int:
    """A 64-bit hash of roles and texts.

    Letter case, the kind and amount of white space, and images are ignored.
    """
    turns = _all_turns(conversation)
    texts = (f"{turn.role}\1{' '.join(turn.words.casefold().split())}" for turn in turns)
    return _hash("\0".join(texts))


def content_hash(conversation: Conversation) -> int:
    """A 64-bit hash of the roles, the exact texts, and which turns are trained.

    Images and few-shot examples are not included.
    """
    conversation = conversation.without_shots()
    turns = [
        (m.role, m.trained, [part if isinstance(part, str) else None for part in m.parts])
        + ((m.reasoning,) if m.reasoning else ())
        for m in _all_turns(conversation)
    ]
    return _hash(
        json.dumps(turns)
        if conversation.desirable is None
        else json.dumps([turns, conversation.desirable])
    )


def _all_turns(conversation: Conversation) -> tuple[Message, ...]:
    """The turns, and after them the rejected answer of a pair."""
    rejected = conversation.rejected
    return conversation.messages if rejected is None else (*conversation.messages, rejected)


def _hash(text: str) -> int:
    """A 64-bit hash of a text."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little"
    )


class ShardMaker:
    """Makes shards in any process; picklable.

    Rows that are `scored` keep all their examples, and need a prompt within `max_length`.
    """

    def __init__(
        self,
        readers: Sequence[SourceReader],
        processors: Sequence[Processor],
        data: DataSection,
        folder: Path,
        *,
        scored: bool = False,
    ) -> None:
        self.readers = readers
        self.processors = processors
        self.data = data
        self.folder = folder
        self.scored = scored
        self._known: dict[Media, ImageInfo | DataError] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": {}}

    def __call__(self, source: int, chunk: Chunk) -> ShardSummary:
        """Writes the shard, unless it exists and is intact, and returns its summary."""
        folder = self.folder / f"{source:04}-{chunk.number:08}"
        if not is_intact(folder) or files_changed(folder):
            shutil.rmtree(folder, ignore_errors=True)
            temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            self._write(source, chunk, temporary, folder)
            temporary.rename(folder)
        return summary(folder)

    def _write(self, source: int, chunk: Chunk, temporary: Path, folder: Path) -> None:
        records: list[RowRecord] = []
        examples: list[Example] = []
        media = MediaTable(temporary / BLOB, folder / BLOB)
        for row in self.readers[source].conversations(chunk):
            media.note(row.file if isinstance(row, DataError) else None)
            record, row_examples = self._row(row, source, media, chunk.first_row + len(records))
            records.append(record)
            examples += row_examples
        numbers = [[media.number(item) for item in example.media] for example in examples]
        media.close()
        write_batches(temporary / "examples.arrow", [example_batch(examples, numbers)])
        write_batches(temporary / "media.arrow", [media_batch(media.rows, folder)])
        write_batches(temporary / "rows.arrow", [record_batch(records)])
        write_stamps(temporary, media.stamps)
        write_checksums(temporary)

    def _row(
        self, row: Conversation | DataError, source: int, media: MediaTable, number: int
    ) -> tuple[RowRecord, list[Example]]:
        if isinstance(row, DataError):
            return _unreadable(row, number), []
        alone = row.without_shots()
        record = RowRecord(
            row.row, row.source, row.id, category=row.category, text=text_hash(alone)
        )
        record.digest = content_hash(row)
        record.regions = len(regions_of(row))
        record.controls = self._controls(alone, self.processors[source])
        try:
            for item in row.media:
                media.note(item.file)
            record.images = [media.add(item, self._look(item)) for item in alone.media]
            for item in row.media:
                self._look(item)
            reason = self._unwanted(alone, [media.rows[image] for image in record.images])
            if reason:
                record.status, (record.kind, record.message) = LEFT_OUT, reason
                return record, []
            fitted = self._fitted(row, self.processors[source], record)
        except DataError as error:
            record.status = BAD
            record.kind = error.kind
            record.message = error.message
            return record, []
        examples = fitted.examples
        long = fitted.overlong
        record.examples = len(examples)
        record.overlong = len(long)
        record.longest = fitted.longest
        record.tokens = sum(len(example.input_ids) for example in examples)
        record.supervised = sum(example.supervised for example in examples)
        if long:
            size = (
                f"the prompt has {record.prompt:,}" if self.scored else f"{max(map(length, long))}"
            )
            record.kind = "overlong"
            record.message = f"{size} tokens, more than data.max_length {self.data.max_length}"
            if self.data.overlong == "fail":
                record.status = BAD
                record.examples = 0
                return record, []
            if not examples:
                record.status = LEFT_OUT
        for example in examples:
            for item in example.media:
                media.add(item, self._look(replace(item, tile=None, grid=None)))
        return record, examples

    def _fitted(
        self, conversation: Conversation, processor: Processor, record: RowRecord
    ) -> Fitted:
        """A row's examples as trained on; for scoring all, if the prompt is not too long."""
        if self.scored:
            examples = processor.examples(conversation)
            fitted = Fitted(examples, [], max(map(length, examples)))
        else:
            fitted = fit(conversation, processor, self.data.overlong)
        if fitted.longest > self.data.max_length:
            record.prompt = len(processor.prompt(conversation).input_ids)
            if self.scored and record.prompt > self.data.max_length:
                return Fitted([], fitted.examples, fitted.longest)
        return fitted

    def _controls(self, conversation: Conversation, processor: Processor) -> str:
        """Names control tokens and media marks in the texts, where the model sees plain text."""
        roles = {
            name: message.role
            for message in _all_turns(conversation)
            for name in processor.encoder.controls_in(message.words)
        }
        return ", ".join(f"{name} in the {role}'s text" for name, role in roles.items())

    def _look(self, item: Media) -> ImageInfo:
        known = self._known.get(item)
        if known is None:
            try:
                known = inspect_media(item)
            except DataError as error:
                known = DataError(error.message, kind=error.kind)
            if len(self._known) < KNOWN_IMAGES:
                self._known[item] = known
        if isinstance(known, DataError):
            raise known
        return known

    def _unwanted(
        self, conversation: Conversation, images: Sequence[MediaRow]
    ) -> tuple[str, str] | None:
        """The (kind, message) of the cleaning rule that leaves a row out; None if none does."""
        clean = self.data.clean
        if clean.min_side is not None:
            for image in images:
                side = min(image.info.width, image.info.height)
                if image.media.modality == "image" and side < clean.min_side:
                    return (
                        "small_image",
                        f"{image.media.name}: {image.info.width}x{image.info.height}, "
                        f"a side under {clean.min_side}",
                    )
        size = sum(len(message.words) for message in _all_turns(conversation))
        if clean.min_chars is not None and size < clean.min_chars:
            return "short_text", f"{size} characters, under {clean.min_chars}"
        if clean.max_chars is not None and size > clean.max_chars:
            return "long_text", f"{size} characters, over {clean.max_chars}"
        if clean.languages:
            language = language_of(" ".join(turn.words for turn in _all_turns(conversation)))
            if language is not None and language not in clean.languages:
                return "language", f"in {quoted(language)}, none of {', '.join(clean.languages)}"
        return None


def _unreadable(error: DataError, number: int) -> RowRecord:
    """The record of a row that its source could not read; `number` is its place in the source."""
    row_number = error.row if isinstance(error.row, int) else number
    # A row that could not be read at all has no content but the error.
    read = error.content is not None and not isinstance(error.content, Exception)
    content = _content(error.content) if read else ""
    return RowRecord(
        row_number,
        error.source,
        status=BAD,
        kind=error.kind,
        message=error.message,
        content=content,
        digest=_hash(content or error.message),
    )


def _content(row: object) -> str:
    """The beginning of a row as JSON, for the quarantine file.

    Values that JSON cannot represent are described, such as `2,048 bytes`.
    """
    try:
        text = json.dumps(row, ensure_ascii=False, default=quoted)[:CONTENT]
    # Nested too deeply, or keys that are not strings.
    except (RecursionError, TypeError, ValueError):
        text = json.dumps(quoted(row, CONTENT))
    # Half a surrogate pair is written as its JSON escape.
    return text.encode("utf-8", "backslashreplace").decode()


STAMPS = "files.json"
"""File of a prepared folder with the modification times of the files its rows depend on."""


def write_stamps(folder: Path, stamps: dict[str, int]) -> None:
    """Writes the modification times of files that the rows in `folder` depend on, by path.

    Raises `OSError`.
    """
    (folder / STAMPS).write_text(json.dumps(stamps))


def read_stamps(folder: Path) -> dict[str, int]:
    """Reads the modification times written by `write_stamps`."""
    return json.loads((folder / STAMPS).read_text())


def files_changed(folder: Path) -> bool:
    """Whether an image or video that the rows depend on was changed, removed or added since."""
    return any(file_stamp(Path(path)) != stamp for path, stamp in read_stamps(folder).items())


def record_batch(records: Sequence[RowRecord]) -> pa.RecordBatch:
    """Converts row records to one record batch."""
    import pyarrow as pa

    def column(name: str, kind: Callable[[], Any]) -> Any:
        return pa.array([getattr(record, name) for record in records], kind())

    return pa.RecordBatch.from_pydict(
        {
            "row": column("row", pa.int64),
            "status": column("status", pa.int8),
            "text": column("text", pa.uint64),
            "longest": column("longest", pa.int32),
            "tokens": column("tokens", pa.int32),
            "supervised": column("supervised", pa.int32),
            "examples": column("examples", pa.int32),
            "overlong": column("overlong", pa.int32),
            "prompt": column("prompt", pa.int32),
            "regions": column("regions", pa.int32),
            "digest": column("digest", pa.uint64),
            "images": column("images", lambda: pa.list_(pa.int32())),
            **{
                name: column(name, pa.string)
                for name in ("source", "id", "kind", "message", "category", "controls", "content")
            },
        }
    )


def summary(folder: Path) -> ShardSummary:
    """Summarises a written shard."""
    from vlm_tune.data.prepare.arrow_store import read_batches

    (rows,) = read_batches(folder / "rows.arrow")
    bad = np.flatnonzero(rows.column("status").to_numpy() == BAD)
    first = None
    if len(bad):
        row = {
            name: rows.column(name)[int(bad[0])].as_py()
            for name in ("source", "row", "kind", "message")
        }
        first = (row["source"], row["row"], row["kind"], row["message"])
    return ShardSummary(folder, rows.num_rows, first)
