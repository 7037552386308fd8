"""Looks at data before there is a recipe: how much there is, how large, and what is answered."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter

from vlm_tune.config.data import AnySource
from vlm_tune.data.audio.decode import clip_seconds
from vlm_tune.data.images.decode import image_size
from vlm_tune.data.prepare.language import language_of
from vlm_tune.data.sources.base import SourceReader
from vlm_tune.data.sources.registry import open_source, read_all
from vlm_tune.data.types import Conversation, Media
from vlm_tune.errors import DataError
from vlm_tune.evaluation.boxes import boxes_in
from vlm_tune.evaluation.texts import normalise
from vlm_tune.paths import home
from vlm_tune.quoting import name_list
from vlm_tune.recipe_writer.find_data import has_media

ROWS = 20_000
"""Rows of a source that are read; `check` reads all."""
SIZED = 500
"""Images whose size is read from their header, or clips that are decoded for their length."""
SHORT = 40
"""Characters that nine of ten answers have at most where answers are short."""
LONGER_THAN_WIDE = 1.25
"""Ratio of an image's sides from which on it is not nearly square."""
LANGUAGE_TEXTS = 50
"""Texts of a source from which the language is detected."""
LATIN_ENDS = 0x250
"""The first code point behind the Latin letters."""

COLOURS = {
    *("red", "orange", "yellow", "green", "blue", "purple", "violet", "pink", "brown", "black"),
    *("white", "grey", "gray", "cyan", "teal", "gold", "silver"),
}
DETAILS = {
    *("left", "right", "top", "bottom", "above", "below", "upper", "lower", "middle", "center"),
    *("centre", "yes", "no", "true", "false"),
}
"""Words of answers that a change of an image's colours can make wrong, and of answers about a part
of an image."""
OFTEN = 0.05
"""Share of answers with such words up to which they are parts of names, as in "orange juice"."""
ASKED = 10
"""Rows of a question, on average, from which on the same is asked about all images."""

Answers = Literal["repeated", "short", "long"]
"""Kinds of answers: few different ones, open but short ones, and sentences."""

SEVERAL = object()
"""Stands for the images of an answer that is given about different ones."""


@dataclass
class _Seen:
    """Counts over the rows that were read.

    `single` counts the rows with exactly one image. `wordings` has the distinct questions; those of
    classifications, which list the choices in any order, are one. `shown_with` has the images of
    each answer, or `SEVERAL`.
    """

    rows: int = 0
    bad: int = 0
    first_fault: DataError | None = None
    fault_kinds: Counter[str] = field(default_factory=Counter)
    outside: list[Path] = field(default_factory=list)
    questions: int = 0
    images: set[object] = field(default_factory=set)
    samples: list[Media] = field(default_factory=list)
    most_images: int = 0
    single: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    shown_with: dict[str, object] = field(default_factory=dict)
    categories: Counter[str] = field(default_factory=Counter)
    longest: int = 0
    texts: list[str] = field(default_factory=list)
    wordings: set[str] = field(default_factory=set)

    def add(self, row: Conversation) -> None:
        self.rows += 1
        answers = [each.text for each in row.messages if each.role == "assistant" and each.trained]
        self.questions += len(answers)
        self.answers.update(answers)
        self.categories[row.category] += 1
        self.wordings.add("" if row.references.form == "classify" else normalise(row.question))
        media = row.media
        self.most_images = max(self.most_images, len(media))
        self.single += len(media) == 1
        shown = tuple(map(_identity, media))
        for answer in answers:
            self.add_shown(answer, shown)
        for each in media:
            identity = _identity(each)
            if identity not in self.images and len(self.samples) < SIZED:
                self.samples.append(each)
            self.images.add(identity)
        texts = [message.text.encode("utf-8", "replace") for message in row.messages]
        self.longest = max(self.longest, sum(map(len, texts)))
        if len(self.texts) < LANGUAGE_TEXTS:
            self.texts.append(" ".join(message.text for message in row.messages))

    def add_shown(self, answer: str, shown: object) -> None:
        """Notes the images that an answer is about; `SEVERAL` if it is about others too."""
        same = self.shown_with.get(answer, shown) == shown
        self.shown_with[answer] = shown if same else SEVERAL

    def add_fault(self, fault: DataError) -> None:
        self.bad += 1
        self.first_fault = self.first_fault or fault
        self.fault_kinds[fault.kind] += 1
        if fault.kind == "image_outside" and fault.file is not None:
            self.outside.append(fault.file.resolve())


@dataclass(frozen=True)
class Facts:
    """Properties of the train rows.

    `rows` counts all of them; the rest is of the first `read` rows that can be used, of each
    source `ROWS` at most. `longest_row` is in bytes of UTF-8, `longest_answer` in characters,
    and sides are in pixels. Where the rows have clips of audio in place of images, `seconds` is
    the length of the longest that was read, else 0, and images are the clips. `single_images`
    says whether each row has exactly one image. `unrepeated` is the share of the questions
    whose answer belongs to one image only. `colours` says whether answers name some,
    `whole_image` whether the same is asked about all images and answers are names: no places,
    boxes, numbers, yes or no. `smallest_class` is the number of rows of the rarest category, 0
    without categories. `language` is an ISO 639-1 code, None if unknown; `latin` is the share
    of the texts' letters that are Latin.
    """

    forms: tuple[str, ...]
    rows: int
    read: int
    bad: int
    questions: int
    images: int
    most_images: int
    single_images: bool
    width: int
    height: int
    seconds: float
    elongated: float
    answers: Answers
    distinct_answers: int
    unrepeated: float
    colours: bool
    whole_image: bool
    longest_answer: int
    longest_row: int
    smallest_class: int
    language: str | None
    latin: float

    @property
    def all_questions(self) -> int:
        """The number of questions of all rows, estimated from those that were read."""
        return max(round(self.questions * self.rows / max(self.read + self.bad, 1)), 1)

    @property
    def all_images(self) -> int:
        """The number of distinct images of all rows, estimated likewise."""
        return max(round(self.images * self.rows / max(self.read + self.bad, 1)), 1)

    @property
    def medium(self) -> str:
        """The noun of the rows' media: image, or clip of audio."""
        return "clip" if self.seconds else "image"

    @property
    def media_text(self) -> str:
        """The number and size of the images or clips, in words."""
        if self.seconds:
            return f"{self.all_images:,} audio clips of up to {self.seconds:.1f} seconds"
        return f"{self.all_images:,} images of {self.width} x {self.height} pixels"

    @property
    def questions_per_image(self) -> float:
        """The mean number of questions about an image."""
        return self.questions / self.images


def look(sources: list[dict[str, Any]]) -> Facts:
    """Reads rows of the sources and says what they are like.

    Where no row's image is in the folder of the rows, the source's `image_root` is set to a folder
    beside them that holds images, or to the one above all images that the rows name.

    Args:
        sources: sources as a recipe writes them; `image_root` may be added to them.

    Raises:
        DataError: a source can't be read, no row can be used, no row has an image or audio, or
            some have images and others audio.
    """
    seen = _Seen()
    forms: list[str] = []
    rows = 0
    for source in sources:
        reader, part = _read_source(source)
        forms.append(reader.form)
        rows += sum(chunk.rows for chunk in reader.chunks())
        _merge(seen, part)
    if not seen.rows:
        assert seen.first_fault is not None
        raise seen.first_fault
    if not seen.images:
        raise DataError(
            f"none of the first {seen.rows:,} rows has an image or audio; tuning needs some",
            source=name_list(_names(sources)),
        )
    return _facts(seen, tuple(dict.fromkeys(forms)), rows)


def _names(sources: Sequence[dict[str, Any]]) -> list[str]:
    return [str(source.get("path", source.get("name"))) for source in sources]


def _opened(source: dict[str, Any]) -> SourceReader:
    return open_source(TypeAdapter(AnySource).validate_python(source), seed=0)


def _read_source(source: dict[str, Any]) -> tuple[SourceReader, _Seen]:
    """The reader of a source and its counts, with an image root that is found where needed."""
    reader = _opened(source)
    seen = _read(reader)
    if seen.rows or source["kind"] != "file":
        return reader, seen
    for root in _image_roots(source, seen):
        candidate = {**source, "image_root": root}
        other = _opened(candidate)
        counts = _read(other)
        if counts.rows:
            source["image_root"] = root
            return other, counts
    return reader, seen


def _image_roots(source: dict[str, Any], seen: _Seen) -> Iterator[str]:
    """Folders that may be above the images of a file's rows, where their own folder is not."""
    parent = Path(source["path"]).parent
    if seen.fault_kinds["image_missing"]:
        inner = [each for each in Path(home(str(parent))).iterdir() if each.is_dir()]
        yield from (str(parent / each.name) for each in sorted(inner) if has_media(each))
    if seen.outside:
        above = Path(os.path.commonpath([path.parent for path in seen.outside]))
        # The root of all files would open every one of them to the rows.
        if above != above.parent:
            yield str(above)


def _read(reader: SourceReader) -> _Seen:
    seen = _Seen()
    for row in islice(read_all([reader]), ROWS):
        if isinstance(row, DataError):
            seen.add_fault(row)
        else:
            seen.add(row)
    if not seen.rows and seen.first_fault is None:
        raise DataError("no rows", source=reader.name)
    return seen


def _merge(whole: _Seen, part: _Seen) -> None:
    """Adds the counts of another source."""
    for name in ("rows", "bad", "questions", "single"):
        setattr(whole, name, getattr(whole, name) + getattr(part, name))
    for name in ("most_images", "longest"):
        setattr(whole, name, max(getattr(whole, name), getattr(part, name)))
    for name in ("fault_kinds", "answers", "categories"):
        getattr(whole, name).update(getattr(part, name))
    for answer, shown in part.shown_with.items():
        whole.add_shown(answer, shown)
    whole.first_fault = whole.first_fault or part.first_fault
    whole.images |= part.images
    whole.wordings |= part.wordings
    whole.texts += part.texts
    whole.samples += part.samples


def _identity(media: Media) -> object:
    """A value that tells an image from others; bytes are not kept for that."""
    source = media.source
    return hashlib.blake2b(source, digest_size=16).digest() if isinstance(source, bytes) else source


def _facts(seen: _Seen, forms: tuple[str, ...], rows: int) -> Facts:
    heard = seen.samples[0].modality == "audio"
    if any((media.modality == "audio") != heard for media in seen.samples):
        raise DataError(
            "some rows have images and others audio, and a model's one tower sees or hears: name "
            "files of one kind",
            kind="modality",
        )
    sizes = [] if heard else _measured(seen.samples, image_size)
    seconds = _measured(seen.samples, clip_seconds) if heard else []
    lengths = sorted(
        length for text, times in seen.answers.items() for length in [len(text)] * times
    )
    letters = [ord(letter) for text in seen.texts for letter in text if letter.isalpha()]
    categories = {name: count for name, count in seen.categories.items() if name}
    return Facts(
        forms=forms,
        rows=max(rows, seen.rows + seen.bad),
        read=seen.rows,
        bad=seen.bad,
        questions=max(seen.questions, 1),
        images=len(seen.images),
        most_images=seen.most_images,
        single_images=seen.single == seen.rows,
        width=round(median([width for width, _ in sizes] or [0])),
        height=round(median([height for _, height in sizes] or [0])),
        seconds=max(seconds, default=0.0),
        elongated=sum(max(each) > LONGER_THAN_WIDE * min(each) for each in sizes)
        / max(len(sizes), 1),
        answers=_kind_of_answers(seen.answers, lengths),
        distinct_answers=len(seen.answers),
        unrepeated=_unrepeated(seen),
        colours=_share_with(seen.answers, COLOURS) > OFTEN,
        whole_image=_asks_for_names(seen),
        longest_answer=lengths[-1] if lengths else 0,
        longest_row=seen.longest,
        smallest_class=min(categories.values(), default=0) if len(categories) > 1 else 0,
        language=_language(seen.texts),
        latin=sum(each < LATIN_ENDS for each in letters) / len(letters) if letters else 1.0,
    )


Measure = TypeVar("Measure")


def _measured(samples: Sequence[Media], measure: Callable[[Media], Measure]) -> list[Measure]:
    """The sizes of the media that can be read. Raises `DataError` if none can."""
    sizes = []
    for media in samples:
        try:
            sizes.append(measure(media))
        except (DataError, OSError):  # `check` names it
            continue
    if not sizes:
        kind = samples[0].modality
        noun = "audio clips" if kind == "audio" else "images"
        raise DataError(
            f"none of the first {len(samples):,} {noun} can be read, such as {samples[0].name}",
            kind=f"{kind}_unreadable",
        )
    return sizes


def _unrepeated(seen: _Seen) -> float:
    """The share of the questions whose answer belongs to one image only."""
    several = sum(times for text, times in seen.answers.items() if seen.shown_with[text] is SEVERAL)
    return 1 - several / max(seen.answers.total(), 1)


def _share_with(answers: Counter[str], words: set[str]) -> float:
    """The share of the answers that have some of these words."""
    times = sum(
        count for text, count in answers.items() if words & set(re.findall(r"\w+", text.lower()))
    )
    return times / max(answers.total(), 1)


def _asks_for_names(seen: _Seen) -> bool:
    """Whether the same is asked about all images, and answers name what a whole image shows."""
    details = sum(
        times
        for text, times in seen.answers.items()
        if re.fullmatch(r"[\d.,\s]+", text) or len(boxes_in(text))
    )
    share = details / max(seen.answers.total(), 1)
    return (
        seen.questions >= ASKED * len(seen.wordings)
        and share + _share_with(seen.answers, DETAILS) <= OFTEN
    )


def _kind_of_answers(answers: Counter[str], lengths: Sequence[int]) -> Answers:
    """Few answers for many questions are a choice; the rest is recognised by its length."""
    short = bool(lengths) and lengths[int(0.9 * (len(lengths) - 1))] <= SHORT
    if short and len(answers) <= max(2, min(200, answers.total() // 4)):
        return "repeated"
    return "short" if short else "long"


def _language(texts: Sequence[str]) -> str | None:
    """The language of most texts; None without the package that tells it."""
    if importlib.util.find_spec("py3langid") is None:
        return None
    languages = Counter(filter(None, map(language_of, texts)))
    return languages.most_common(1)[0][0] if languages else None
