"""Prepares the images of a native model by its own processor, which is tried first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vlm_tune.data.chat.own_template import image_text, video_text
from vlm_tune.data.images.native import NativeImages, of_images, prepared_images
from vlm_tune.data.types import Media
from vlm_tune.errors import ModelError
from vlm_tune.model.pretrained.image_joins import image_joins, is_joined, token_types
from vlm_tune.model.pretrained.native import lead_ids, native_config, renderer, special_tokens
from vlm_tune.model.pretrained.native_videos import encoded, with_videos
from vlm_tune.quoting import quoted, reason_of

if TYPE_CHECKING:
    from PIL.Image import Image

TRIED = ((96, 64), (50, 140))
"""Sizes of the images that a processor is tried with."""


def native_images(processor: Any, name: str | None = None) -> NativeImages:
    """Prepares images and videos by a native model's own processor.

    Args:
        processor: the processor.
        name: the checkpoint, whose config is compared with the processor; None for a saved model.

    Raises:
        ModelError: the processor makes of several images another thing than of each by itself, or
            writes another token for them than the config has.
    """
    render = renderer(processor)
    text = image_text(render)
    images = tried_images()
    try:
        alone = [prepared_images(processor, [text], [image]) for image in images]
        together = prepared_images(processor, [text * len(images)], images)
        rows = prepared_images(processor, [text, text], [[images[0]], [images[0]]])
        lead = len(lead_ids(processor, render))
    except (TypeError, ValueError, AttributeError, RuntimeError, LookupError) as error:
        raise ModelError(
            f"a {type(processor).__name__} can't be used here: {reason_of(error)}"
        ) from None
    ids = together["input_ids"][0].tolist()
    if name is not None:
        _check_image_token(name, ids)
    special = set(special_tokens(processor.tokenizer))
    names = processor.tokenizer.convert_ids_to_tokens(sorted(set(ids[lead:])))
    tried = [of_images(each) for each in alone]
    native = NativeImages(
        size=TRIED[0][0],
        processor=processor,
        text=text,
        controls=tuple(name for name in names if name in special),
        lead=lead,
        joins=image_joins(tried, of_images(together)),
        token_types=token_types(together),
    )
    if is_joined(tried, native.joins, of_images(together)) and is_joined(
        [tried[0], tried[0]], native.joins, of_images(rows)
    ):
        for numbered in (False, True):
            by_number = replace(native, numbered=numbered)
            if _ids_of_tried(by_number) == ids[lead:]:
                return with_videos(by_number, images, video_text(render), special)
    raise ModelError(
        f"a {type(processor).__name__} processes two images in a row differently from each one "
        "alone, so images can't be prepared one by one"
    )


def _check_image_token(name: str, ids: Sequence[int]) -> None:
    """Raises `ModelError` if the ids of images are not those by which the model finds images."""
    config = native_config(name)
    keys = ("image_token_id", "image_token_index")
    key = next((key for key in keys if isinstance(getattr(config, key, None), int)), None)
    if key is not None and getattr(config, key) not in ids:
        raise ModelError(
            f"model.pretrained: {quoted(name)} has {key} {getattr(config, key)} in its config, and "
            "its processor writes no such token for an image: they belong to different checkpoints"
        )


def _ids_of_tried(images: NativeImages) -> list[int]:
    """The tokens of the tried images in a row, as each gets them by itself."""
    media = [Media(encoded(image)) for image in tried_images()]
    segments = [
        segment for place, item in enumerate(media) for segment in images.segments(item, place)
    ]
    return [token for segment in segments for token in segment.ids or ()]


def tried_images() -> list[Image]:
    """Images of unlike shapes."""
    from PIL import Image

    return [Image.radial_gradient("L").resize(size).convert("RGB") for size in TRIED]
