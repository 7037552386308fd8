"""Videos as native models' own processors prepare them, where they prepare them one by one."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vlm_tune.data.chat.template import joined_texts
from vlm_tune.data.images.native import (
    NativeImages,
    of_images,
    prepared_images,
    prepared_videos,
)
from vlm_tune.data.types import Media, Segment, Video
from vlm_tune.errors import ModelError
from vlm_tune.model.pretrained.image_joins import image_joins, is_joined, token_types

if TYPE_CHECKING:
    from PIL.Image import Image

RATE = 10.0
STEP = 7
"""Frames per second of tried videos, and their frames from one chosen frame to the next."""
COUNTS = (3, 4)
"""The chosen frames of the videos that a processor is tried with."""
BEFORE = "Here:"
BEHIND = "What happens?"
"""Texts around tried videos."""


def with_videos(
    images: NativeImages, tried: Sequence[Image], text: str, special: Collection[str]
) -> NativeImages:
    """The same, taking videos whole if their processor and chat template know them.

    A model whose processor has no videos, or prepares one beside other media otherwise than alone,
    takes their frames as images.

    Args:
        images: what prepares the model's images.
        tried: two images of different sizes to try it with.
        text: what the chat template writes for a video.
        special: the tokenizer's special tokens.
    """
    processor = images.processor
    if not text or images.numbered or getattr(processor, "video_processor", None) is None:
        return images
    videos = [
        (tried_video(image, count), _frames(image, count))
        for image, count in zip(tried, COUNTS, strict=True)
    ]
    try:
        alone = [prepared_videos(processor, [text], [video]) for video in videos]
        together = prepared_videos(processor, [text * len(videos)], videos)
        picture = prepared_images(processor, [images.text], tried[:1])
        in_text = BEFORE + text + images.text + text + BEHIND
        mixed = prepared_videos(processor, [in_text], videos, tried[:1])
        types = token_types(mixed)
    except (TypeError, ValueError, AttributeError, RuntimeError, LookupError, ModelError):
        return images
    inputs = [of_images(each) for each in alone]
    joins = image_joins(inputs, of_images(together))
    names = [join.name for join in joins]
    ids = mixed["input_ids"][0].tolist()
    shown = processor.tokenizer.convert_ids_to_tokens(sorted(set(ids[images.lead :])))
    whole = replace(
        images,
        video_text=text,
        joins=(*joins, *(join for join in images.joins if join.name not in names)),
        controls=tuple(dict.fromkeys([*images.controls, *(n for n in shown if n in special)])),
        token_types=types,
    )
    in_order = [inputs[0], of_images(picture), inputs[1]]
    media = [
        Media(videos[0][0], "video"),
        Media(encoded(tried[0])),
        Media(videos[1][0], "video"),
    ]
    same = _ids(whole, media) == ids[images.lead :]
    return whole if same and is_joined(in_order, whole.joins, of_images(mixed)) else images


def _ids(images: NativeImages, media: Sequence[Media]) -> list[int]:
    """The tokens of media between two texts, as their segments say."""
    segments = [segment for item in media for segment in images.segments(item)]
    texts = [Segment("text", BEFORE), *segments, Segment("text", BEHIND)]
    tokenizer = images.processor.tokenizer
    ids: list[int] = []
    for segment in joined_texts(texts):
        if segment.ids is None:
            ids += tokenizer(str(segment.payload), add_special_tokens=False)["input_ids"]
        else:
            ids += segment.ids
    return ids


def tried_video(image: Image, count: int) -> Video:
    """A video of frames that an image darkens over."""
    frames = tuple(Media(encoded(frame), of_video=True) for frame in _frames(image, count))
    places = tuple(range(0, STEP * count, STEP))
    return Video(frames, places, STEP * count, RATE, tuple(place / RATE for place in places))


def _frames(image: Image, count: int) -> list[Image]:
    shades = [[value // (number + 1) for value in range(256)] * 3 for number in range(count)]
    return [image.point(shade) for shade in shades]


def encoded(image: Image) -> bytes:
    """An image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
