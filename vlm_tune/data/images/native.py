"""Images and videos as a native model's own processor prepares them, and their tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vlm_tune.data.affine import Affine
from vlm_tune.data.images.decode import ImageProcessor, decode_image, encoded_bytes, image_size
from vlm_tune.data.media_processor import frame_parts
from vlm_tune.data.types import Join, Media, NativeInputs, Segment, Video
from vlm_tune.errors import DataError
from vlm_tune.quoting import reason_of

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    Frames = np.ndarray | Sequence[Image]

TYPES = ("mm_token_type_ids", "token_type_ids")
"""Arguments that tell kinds of tokens apart, by the names of transformers' forward passes."""
OF_TEXT = ("input_ids", "attention_mask", *TYPES)
"""What a processor returns for the text; all else is of its images and videos."""
SIZES = 100_000
"""Sizes of images, and of videos with their times, whose tokens are remembered."""


class Seen(NamedTuple):
    """An image as a model sees it: its tokens, and width and height of what it is resized to."""

    ids: tuple[int, ...]
    frame: tuple[int, int]


@dataclass(frozen=True)
class NativeImages(ImageProcessor):
    """Prepares images and videos by a processor of transformers.

    The tokens of an image depend on its size alone, and with `numbered` on its number in its row;
    those of a video on the size, number and places of its frames. What the processor makes of
    several of them is what it makes of each, joined by `joined_inputs`;
    `vlm_tune.model.pretrained.native_images` checks that.

    Attributes:
        processor: transformers' processor of the whole model.
        text: What the chat template writes in an image's place.
        video_text: What it writes in a video's place; empty for a model that takes videos as the
            images of their frames.
        controls: The special tokens among the tokens of an image and a video.
        lead: The number of tokens that the processor puts before any text.
        numbered: Whether an image's tokens tell its number in the row.
        joins: How inputs are joined that are not simply put one behind the other.
        token_types: Arguments of the model's forward pass that tell kinds of tokens apart: the type
            of each token id that has another than 0, by the argument's name.
    """

    processor: Any = None
    text: str = ""
    video_text: str = ""
    controls: tuple[str, ...] = ()  # pyright: ignore[reportIncompatibleMethodOverride]
    lead: int = 0
    numbered: bool = False
    joins: tuple[Join, ...] = ()
    token_types: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    _seen: dict[Any, Seen] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def layout(self) -> tuple[Any, ...]:
        texts = self.text, self.video_text
        return *texts, type(self.processor).__name__, self.processor.to_json_string()

    def save(self, folder: Path) -> None:
        self.processor.save_pretrained(folder)

    def segments(self, media: Media, place: int = 0, among: int = 1) -> list[Segment]:
        """The segment of an image or video, with its tokens.

        Words that a video begins with, such as a time, are a text before it, which joins the text
        around. Raises `DataError` for an unreadable header, and for a video whose frames differ in
        size.
        """
        if isinstance(media.source, Video):
            words, ids = self._of_video(media.source, media.name)
            opening = [Segment("text", words)] if words else []
            return [*opening, Segment("media", media, ids=ids)]
        seen = self._of_size(image_size(media), media.name, place)
        return [Segment("media", media, ids=seen.ids)]

    def parts(self, media: Media) -> tuple[str | Media, ...]:
        return (media,) if self.video_text else frame_parts(media)

    def frame(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of an image as resized, if the processor gives its grid of patches."""
        return self._of_size((width, height), f"an image of {width}x{height}").frame

    def places(self, width: int, height: int) -> Affine:
        frame_width, frame_height = self.frame(width, height)
        return Affine.scale(frame_width / width, frame_height / height)

    def _of_size(self, size: tuple[int, int], name: str, place: int = 0) -> Seen:
        """An image of this size as the model sees it; `name` is the image's in errors."""
        from PIL.Image import new

        key = (*size, place if self.numbered else 0)
        seen = self._seen.get(key)
        if seen is None:
            image = new("RGB", size)
            prepared = self._prepared([image], name)
            ids = prepared["input_ids"][0].tolist()[self.lead :]
            if key[-1]:
                before = self._prepared([image] * place, name)["input_ids"][0]
                together = self._prepared([image] * (place + 1), name)["input_ids"][0]
                ids = together[len(before) :].tolist()
            frame = size
            if "image_grid_thw" in prepared:
                _, rows, columns = prepared["image_grid_thw"][0].tolist()
                patch = self.processor.image_processor.patch_size
                frame = (columns * patch, rows * patch)
            seen = Seen(tuple(ids), frame)
            if len(self._seen) < SIZES:
                self._seen[key] = seen
        return seen

    def _of_video(self, video: Video, name: str) -> tuple[str, tuple[int, ...]]:
        """The words that a video begins with, and its tokens behind them.

        They are those of blank frames of its size, at its places.
        """
        sizes = {image_size(frame) for frame in video.frames}
        if len(sizes) > 1:
            listed = ", ".join(f"{width}x{height}" for width, height in sorted(sizes))
            raise DataError(
                f"{name}: the frames of a video have one size, these have {listed}",
                kind="video_unreadable",
            )
        ((width, height),) = sizes
        key = (width, height, video.places, video.count, video.fps)
        seen = self._seen.get(key)
        if seen is None:
            blank = np.zeros((len(video.frames), height, width, 3), np.uint8)
            ids = self._prepared_video(video, blank, name)["input_ids"][0].tolist()
            seen = Seen(tuple(ids[self.lead :]), (width, height))
            if len(self._seen) < SIZES:
                self._seen[key] = seen
        tokenizer = self.processor.tokenizer
        controls = set(tokenizer.convert_tokens_to_ids(list(self.controls)))
        words = len(list(takewhile(lambda token: token not in controls, seen.ids)))
        return str(tokenizer.decode(seen.ids[:words])), seen.ids[words:]

    def __call__(self, media: Media) -> torch.Tensor:
        raise NotImplementedError("a native model takes no square pixels, but `inputs`")

    def inputs(self, media: Media) -> NativeInputs:
        """The inputs that the model takes of an image or video.

        Raises `DataError` if it is damaged.
        """
        if isinstance(media.source, Video):
            frames = [decode_image(encoded_bytes(each), each.name) for each in media.source.frames]
            return of_images(self._prepared_video(media.source, frames, media.name))
        image = decode_image(encoded_bytes(media), media.name)
        return of_images(self._prepared([image], media.name))

    def _prepared(self, images: Sequence[Image], name: str) -> Any:
        """All that the processor returns for images in one text."""
        try:
            return prepared_images(self.processor, [self.text * len(images)], images)
        except (ValueError, ZeroDivisionError) as error:
            raise DataError(
                f"{name}: the model's own image processor refuses it: {reason_of(error)}",
                kind="image_unreadable",
            ) from None

    def _prepared_video(self, video: Video, frames: Frames, name: str) -> Any:
        """All that the processor returns for a video, shown by these frames."""
        try:
            return prepared_videos(self.processor, [self.video_text], [(video, frames)])
        except (ValueError, ZeroDivisionError) as error:
            raise DataError(
                f"{name}: the model's own video processor refuses it: {reason_of(error)}",
                kind="video_unreadable",
            ) from None


def prepared_images(
    processor: Any, texts: Sequence[str], images: Sequence[Image | Sequence[Image]]
) -> Any:
    """The ids and tensors that a processor of transformers makes of texts with images."""
    return processor(
        text=list(texts),
        images=list(images),
        add_special_tokens=False,
        return_tensors="pt",
    )


def prepared_videos(
    processor: Any,
    texts: Sequence[str],
    videos: Sequence[tuple[Video, Frames]],
    images: Sequence[Image] = (),
) -> Any:
    """The ids and tensors of texts with videos, each shown by its frames, and with images."""
    return processor(
        text=list(texts),
        images=list(images) or None,
        videos=[frames for _, frames in videos],
        add_special_tokens=False,
        return_tensors="pt",
        **video_options([video for video, _ in videos]),
    )


def video_options(videos: Sequence[Video]) -> dict[str, Any]:
    """A processor's options for videos whose frames have been chosen already."""
    return {
        "do_sample_frames": False,
        "video_metadata": [
            {
                "total_num_frames": video.count,
                "fps": video.fps,
                "frames_indices": list(video.places),
            }
            for video in videos
        ],
    }


def of_images(prepared: Any) -> NativeInputs:
    """The inputs of images and videos among all that a processor returns."""
    return {name: value for name, value in prepared.items() if name not in OF_TEXT}


def joined_inputs(inputs: Sequence[NativeInputs], joins: Sequence[Join] = ()) -> NativeInputs:
    """The inputs of several images and videos, in their order, as a forward pass takes them.

    Each input is joined over those that have it, along the first dimension unless `joins` says
    otherwise; where they differ in other dimensions, with zeros behind.
    """
    rules = {join.name: join for join in joins}
    names = dict.fromkeys(name for one in inputs for name in one)
    return {
        name: _joined([one for one in inputs if name in one], rules.get(name, Join(name)))
        for name in names
    }


def _joined(inputs: Sequence[NativeInputs], join: Join) -> torch.Tensor:
    import torch
    from torch.nn.functional import pad

    tensors = [one[join.name] for one in inputs]
    if join.counted:
        tensors = _counted_on(tensors, [one[join.counted] for one in inputs], join)
    most = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        room = [
            0 if place == join.dimension else size - tensor.shape[place]
            for place, size in enumerate(most)
        ]
        return pad(tensor, [each for size in reversed(room) for each in (0, size)])

    return torch.cat([padded(tensor) for tensor in tensors], join.dimension)


def _counted_on(
    tensors: Sequence[torch.Tensor], counted: Sequence[torch.Tensor], join: Join
) -> list[torch.Tensor]:
    """Places in each image's part of an input, as places in the whole; negative ones are none."""
    moved = []
    before = 0
    for tensor, whole in zip(tensors, counted, strict=True):
        moved.append(tensor + before * (tensor >= 0).to(tensor.dtype))
        before += math.prod(whole.shape[: join.counted_dimensions])
    return moved
