"""The interface between a tower's media and the rest: preprocessing of images or audio clips."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlm_tune.data.affine import Affine
from vlm_tune.data.types import Conversation, Media, Modality, NativeInputs, Segment, Video

if TYPE_CHECKING:
    import torch


class MediaProcessor(Protocol):
    """The preprocessing of a tower's media: images, or audio clips.

    A frame is what the tower takes at once: an image, a tile of one, or a window of a clip.
    """

    @property
    def modality(self) -> Modality:
        """The modality of what the tower takes."""
        ...

    @property
    def markers(self) -> Sequence[str]:
        """The control tokens that stand between frames."""
        ...

    @property
    def controls(self) -> Sequence[str]:
        """Tokens that no text may contain, where a media item has tokens of its own."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tower's input for a frame."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tower's input."""
        ...

    @property
    def layout(self) -> tuple[Any, ...]:
        """All that the number of a media item's slots depends on, beside the slots of a frame."""
        ...

    @property
    def most_frames(self) -> int:
        """The largest number of frames of a media item."""
        ...

    def parts(self, media: Media) -> tuple[str | Media, ...]:
        """The parts of a turn that show an item: itself, or the frames of a video with their times.

        A native model with a form of its own for videos takes them whole.
        """
        ...

    def whole(self, media: Media) -> Media:
        """The frame that shows a media item as a whole. Raises as `segments`."""
        ...

    def segments(self, media: Media, place: int = 0, among: int = 1) -> list[Segment]:
        """The segments of a media item in a prompt: its frames, and the markers around them.

        `among` is the number of media items of its row, `place` that of those before it. Raises
        `DataError` for an item whose size can't be read.
        """
        ...

    def expand(self, media: Media, among: int = 1) -> tuple[Media, ...]:
        """The frames of a media item in their order; arguments and errors as of `segments`."""
        ...

    def __call__(self, media: Media) -> torch.Tensor:
        """The tower's input for a frame. Raises `DataError` if it can't be decoded."""
        ...

    def inputs(self, media: Media) -> torch.Tensor | NativeInputs:
        """The model's input for a frame: the tower's, as `__call__`, or a native model's inputs."""
        ...

    def frame(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of what the model sees of an image of this size.

        Raises `DataError` for a model that sees none, as `places`.
        """
        ...

    def places(self, width: int, height: int) -> Affine:
        """Where the places of an image of this size are in what the model sees of it."""
        ...

    def save(self, folder: Path) -> None:
        """Writes what prepares the media, where that is not in the model's config."""
        ...

    def fresh(self) -> MediaProcessor:
        """A copy that remembers no media, for another thread or process."""
        ...

    def plain(self) -> Media:
        """A media item in which there is nothing, to try a model with."""
        ...


def frame_parts(media: Media) -> tuple[str | Media, ...]:
    """The frames of a video, each after its time ("0.0s: ") where that is known.

    Of any other item it is the item itself.
    """
    if not isinstance(media.source, Video):
        return (media,)
    video = media.source
    if not video.seconds:
        return video.frames
    timed = zip(video.seconds, video.frames, strict=True)
    return tuple(part for time, frame in timed for part in (f"{time:.1f}s: ", frame))


def distinct_frames(rows: Iterable[Conversation], images: MediaProcessor) -> list[Media]:
    """The distinct frames of the rows' media, in order of first use; raises as `segments`."""
    frames = (
        frame for row in rows for item in row.media for frame in images.expand(item, len(row.media))
    )
    return list(dict.fromkeys(frames))
