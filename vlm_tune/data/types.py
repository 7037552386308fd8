"""Types shared by the data side, the model and the training loop; imports nothing else of vlm_tune.

Shapes: B rows, L tokens, M media items of a batch, N tokens a media item, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch

IGNORE_INDEX = -100
"""The label of a token that is not supervised, as in torch's cross-entropy."""

ROLES = ("system", "user", "assistant")

Modality = Literal["image", "audio", "video"]
"""What a media item is; a tower takes images or audio, a native model also videos."""

CHOSEN, REJECTED, MISMATCHED = range(3)
ANSWER_KINDS = 3
"""Kinds of answers in rows of preferences: liked, disliked, and another row's.

In a batch, answers to prompt p have the numbers ANSWER_KINDS * p + kind; some may be missing.
"""


@dataclass(frozen=True)
class Slice:
    """A byte range of a file: `size` bytes from `offset`, such as a member of a tar archive."""

    path: Path
    offset: int
    size: int

    def read_bytes(self) -> bytes:
        """Reads the bytes of the range from the file."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def __str__(self) -> str:
        return f"{self.path}[{self.offset}:{self.offset + self.size}]"


@dataclass(frozen=True)
class Tile:
    """One cell of an image that is cut into a grid: its position, from 0, and the grid's size.

    How tiles and wholes fill slots is in `vlm_tune/data/media_slots.py`.

    Attributes:
        size: the image's (width, height) where the tiles are joined again, without the padding
            around the image.
        most: the number of tiles whose tokens a joined picture has at most, about; larger ones are
            shrunk.
        ended: whether it is a whole image among several of a row, which a learned token ends.
    """

    column: int
    row: int
    columns: int
    rows: int
    size: tuple[int, int] | None = None
    most: int | None = None
    ended: bool = False


@dataclass(frozen=True)
class PatchGrid:
    """The rows and columns of patches of an image that keeps its shape.

    Each square of `merge` x `merge` patches takes one slot of the LLM's input.
    """

    rows: int
    columns: int
    merge: int = 1

    @property
    def patches(self) -> int:
        """The number of patches."""
        return self.rows * self.columns

    @property
    def slots(self) -> tuple[int, int]:
        """The rows of slots, and the slots of a row."""
        return self.rows // self.merge, self.columns // self.merge


@dataclass(frozen=True)
class Video:
    """The frames that were chosen of a video, and where they stand in it.

    Attributes:
        frames: the frames as images, in their order.
        places: the number of each frame in the video, from 0.
        count: the number of frames of the video.
        fps: the video's frames per second; None where they are unknown.
        seconds: the time of each frame; empty where times are unknown.
    """

    frames: tuple[Media, ...]
    places: tuple[int, ...]
    count: int
    fps: float | None = None
    seconds: tuple[float, ...] = ()

    def with_frames(self, change: Callable[[Media], Media]) -> Video:
        """The same video with each frame changed."""
        return replace(self, frames=tuple(map(change, self.frames)))


@dataclass(frozen=True)
class Media:
    """One image, audio clip or video; not decoded here.

    An image or a clip is a file, a byte range of a file, or encoded bytes, and a video its chosen
    frames. These are images, and `of_video` as the video is; `origin` is the file that they were
    decoded from. `tile` is set on a cell of a larger image and on a window of a longer clip, whose
    windows are the columns of one row; None is the whole. `grid` is set on an image for a tower
    that keeps its shape. `label` names bytes in error messages.
    """

    source: Path | Slice | bytes | Video
    modality: Modality = "image"
    tile: Tile | None = None
    grid: PatchGrid | None = None
    of_video: bool = field(default=False, compare=False)
    origin: Path | None = field(default=None, compare=False)
    label: str = field(default="<bytes>", compare=False)

    @property
    def file(self) -> Path | None:
        """The file the item is or was read from; None for bytes that came with a row."""
        if isinstance(self.source, bytes | Video):
            return self.origin
        return self.source.path if isinstance(self.source, Slice) else self.source

    def read(self) -> bytes:
        """Reads the encoded bytes of an image or clip. Raises `OSError` for an unreadable file."""
        assert not isinstance(self.source, Video)
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()

    @property
    def name(self) -> str:
        """The name of the item in error messages."""
        source = self.source
        if isinstance(source, Video):
            if self.origin is None:
                return f"the video that begins with {source.frames[0].name}"
            source = self.origin
        if isinstance(source, bytes):
            return self.label
        # A file name may hold bytes that are not valid text.
        return str(source).encode("utf-8", "backslashreplace").decode()

    @property
    def pictures(self) -> tuple[Media, ...]:
        """The images of a video, and of any other item itself."""
        return self.source.frames if isinstance(self.source, Video) else (self,)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `parts` are texts and media in reading order.

    An answer that is not `trained` is context only. `reasoning` is what stands before an answer in
    a field of its own; a row may have it in the answer's text too (`ChatTemplate.parted`).
    """

    role: str
    parts: tuple[str | Media, ...]
    trained: bool = True
    reasoning: str = ""

    @property
    def text(self) -> str:
        """The turn's text without its media."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def words(self) -> str:
        """The turn's text, behind its reasoning if it has some."""
        return f"{self.reasoning} {self.text}" if self.reasoning else self.text


@dataclass(frozen=True)
class References:
    """Further references of a row's last answer, besides the text of its last turn.

    Attributes:
        form: the form of the row in its file, by which metrics are chosen.
        answers: the reference answers of a row that has several, else empty.
        choices: the choices, in the order in which the question shows them.
        chosen: the place of the right one among them, from 0.
        size: width and height of the image that the answer's boxes or points are of.
    """

    form: str = ""
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    chosen: int | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Conversation:
    """A sample: its turns, a stable id, and its location (source, row from 1).

    Scores are also reported by `category` and by `source_name`, the name of its source in the
    recipe. `shots` is the number of messages, directly after a system turn, that are few-shot
    examples taken from other rows. `references` adds to the last turn what scores need.

    Attributes:
        rejected: The answer that people like less than that of the last turn, in a row of
            preferences.
        desirable: Whether people like the answer, in a row that judges its one answer.
    """

    id: str
    messages: tuple[Message, ...]
    category: str = ""
    source: str = ""
    row: int = 0
    source_name: str = ""
    shots: int = 0
    references: References = References()
    rejected: Message | None = None
    desirable: bool | None = None

    @property
    def items(self) -> tuple[Media, ...]:
        """All media in reading order, a video as one."""
        return tuple(
            part for message in self.messages for part in message.parts if isinstance(part, Media)
        )

    @property
    def media(self) -> tuple[Media, ...]:
        """All images and clips in reading order, a video as its frames."""
        return tuple(picture for item in self.items for picture in item.pictures)

    @property
    def question(self) -> str:
        """The text of the last question."""
        return next((each.text for each in reversed(self.messages) if each.role == "user"), "")

    def without_shots(self) -> Conversation:
        """The conversation without its few-shot examples."""
        if not self.shots:
            return self
        start = sum(message.role == "system" for message in self.messages)
        return replace(
            self, messages=(*self.messages[:start], *self.messages[start + self.shots :]), shots=0
        )


def distinct_media(conversations: Iterable[Conversation]) -> list[Media]:
    """The distinct media items of the conversations, in order of first use."""
    return list(dict.fromkeys(item for row in conversations for item in row.media))


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered conversation: plain text, one control token or one media item.

    `trained` says whether its tokens are supervised. `ids` are a media item's tokens, if the
    model's own processor says which they are. `row_ends` are control tokens after the rows of an
    image's slots: after each but the last, and after the last.
    """

    kind: Literal["text", "control", "media"]
    payload: str | Media
    trained: bool = False
    ids: tuple[int, ...] | None = None
    row_ends: tuple[str, str] | None = None


class Join(NamedTuple):
    """How an input that a native model takes of its images is joined over several of them.

    Attributes:
        name: The input.
        dimension: The dimension along which it is joined.
        counted: For places that are counted on from image to image, the input whose places they
            are; no name for others.
        counted_dimensions: The number of leading dimensions of that input that count.
    """

    name: str
    dimension: int = 0
    counted: str = ""
    counted_dimensions: int = 0


@dataclass(frozen=True)
class InputSpec:
    """Everything that the data side knows about the model.

    Images that keep their shape take up to `tokens_per_image` slots, others exactly these. Without
    `branches` a decoder reads one sample per row: answers to one prompt are rows of their own.
    """

    tokens_per_image: int
    layout: Literal["causal", "seq2seq"]
    max_length: int
    pad_id: int
    eos_id: int
    joins: tuple[Join, ...] = ()
    branches: bool = True


@dataclass(frozen=True)
class Example:
    """One row of token ids with final labels and reserved media slots.

    input_ids: int32[L]; labels: int32[L] (causal: the target of each position) or int32[T]
    (seq2seq: the decoder's targets), IGNORE_INDEX where not supervised; image_mask: bool[L].

    Rows joined by `branch_layout` or `pack_layout` also have, for a decoder, `positions` and
    `visible_until` (int32[L]): token i attends to token j where j <= i < visible_until[j]. For an
    encoder-decoder they have `samples` (int32[L]) and `label_samples` (int32[T]): the number of the
    sample that a token belongs to; no token attends to another sample. With `label_samples` alone,
    the labels are several answers to the one sample of the row.

    Attributes:
        answers: In rows of preferences, int32 of the labels' shape: the number of the answer that a
            label belongs to, -1 where there is none. It is ANSWER_KINDS * p + kind for prompt p
            of the row's P, where an answer may be judged alone.
        reference: The reference model's summed log-probability of each answer,
            float32[ANSWER_KINDS * P], where it was computed before training.
    """

    id: str
    input_ids: np.ndarray
    labels: np.ndarray
    image_mask: np.ndarray
    media: tuple[Media, ...]
    category: str = ""
    positions: np.ndarray | None = None
    visible_until: np.ndarray | None = None
    samples: np.ndarray | None = None
    label_samples: np.ndarray | None = None
    questions: int = 1
    answers: np.ndarray | None = None
    reference: np.ndarray | None = None

    @property
    def judged(self) -> int:
        """The number of prompts whose answers are judged, in a row of preferences."""
        if self.answers is None:
            return 0
        return (int(self.answers.max(initial=-1)) + ANSWER_KINDS) // ANSWER_KINDS

    @property
    def answer_numbers(self) -> int:
        """The numbers that its answers take up: one of each kind for each prompt."""
        return ANSWER_KINDS * self.judged

    @property
    def supervised(self) -> int:
        """The number of supervised tokens."""
        return int((self.labels != IGNORE_INDEX).sum())


@dataclass(frozen=True)
class Prompt:
    """A row whose last answer is to be sampled, and the example of all that is before it."""

    row: Conversation
    example: Example


NativeInputs = dict[str, "torch.Tensor"]
"""What a native model's processor makes of images, by the names of its forward pass's arguments."""
