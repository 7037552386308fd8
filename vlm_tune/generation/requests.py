"""Converts chat requests, with their turns and images, into conversations."""

from __future__ import annotations

import difflib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from vlm_tune.data.chat.image_marks import split_marks
from vlm_tune.data.images.decode import upright
from vlm_tune.data.sources.legible import SURROGATE
from vlm_tune.data.sources.media import data_url
from vlm_tune.data.types import ROLES, Conversation, Media, Message
from vlm_tune.errors import ArgumentError, DataError
from vlm_tune.quoting import quoted, reason_of

KEYS = ("prompt", "messages", "image", "images")
TURN_KEYS = ("role", "content")
PLAIN_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""PIL modes that PNG supports; images of other modes are encoded as TIFF."""
IMAGE_KINDS = "a path, a data URL, bytes, a file object, a PIL image or a uint8 array"


def request_conversation(number: int, request: Any) -> Conversation:
    """Converts one request to a conversation.

    Places of images are `<image>` marks in questions and system texts, and image parts without an
    image of their own. They take the request's images in order. Without any place the images go
    before the first question.

    Args:
        number: The number of the request, from 1, for messages and the conversation's id.
        request: A text, or `{"prompt" or "messages": ..., "image" or "images": ...}`. A prompt is a
            text, messages are turns `{"role", "content"}` whose contents are texts or lists of
            parts; either may be the other.

    Raises:
        DataError: The request has another form, an image is unreadable, or the numbers of places
            and images differ.
    """
    try:
        messages = _messages(request)
    except DataError as error:
        raise DataError(f"request {number}: {error.message}", kind=error.kind) from None
    labels = (f"request {number}: image {place}" for place in count(1))
    for place, message in enumerate(messages):
        parts = (
            part if isinstance(part, str) else replace(part, label=next(labels))
            for part in message.parts
        )
        messages[place] = replace(message, parts=tuple(parts))
    return Conversation(f"request {number}", tuple(messages), row=number)


def check_text(name: str, text: Any) -> None:
    """Raises `ArgumentError` unless an argument, called `name`, is a text of whole characters."""
    if not isinstance(text, str):
        raise ArgumentError(f"{name} is a text, got {quoted(text)}")
    if SURROGATE.search(text):
        raise ArgumentError(
            f"{name} is a text of whole characters, got half a surrogate pair (or a byte that "
            f"is no UTF-8) in {quoted(text)}"
        )


def _messages(request: Any) -> list[Message]:
    if isinstance(request, str):
        request = {"prompt": request}
    if not isinstance(request, Mapping):
        raise DataError(
            f'a request is a text or {{"prompt": ..., "images": [...]}}, got {quoted(request)}'
        )
    _known(request, KEYS)
    if ("prompt" in request) == ("messages" in request):
        raise DataError("a request has a `prompt`, or in its place `messages`")
    if request.get("image") is not None and request.get("images") is not None:
        raise DataError("both `image` and `images`")
    images = request.get("images") if request.get("image") is None else request["image"]
    media = [image_media(image) for image in _listed(images)]
    prompt = request.get("prompt", request.get("messages"))
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(turns, Sequence) or isinstance(turns, bytes) or not turns:
        raise DataError(f"a prompt is a text or a list of turns, got {quoted(prompt)}")
    places = [0]

    def take() -> Media | None:
        places[0] += 1
        return media[places[0] - 1] if places[0] <= len(media) else None

    messages = [_message(place, turn, take) for place, turn in enumerate(turns, 1)]
    first = next((place for place, message in enumerate(messages) if message.role == "user"), None)
    if first is None or messages[-1].role != "user":
        raise DataError("a chat ends with the user's turn")
    if not places[0]:
        messages[first] = Message("user", (*media, *messages[first].parts))
    elif places[0] != len(media):
        advice = r"; \<image> is the text itself" if places[0] > len(media) else ""
        raise DataError(
            f"{len(media)} images and {places[0]} <image> marks or parts for them{advice}",
            kind="image_count",
        )
    return messages


def _known(given: Mapping[Any, Any], keys: Sequence[str]) -> None:
    for key in given:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, 1)
            advice = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(keys)}"
            raise DataError(f"unknown key {quoted(key)}; {advice}")


def _listed(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def _message(place: int, turn: Any, take: Callable[[], Media | None]) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(
            f"turn {place}: a turn is a mapping with role and content, got {quoted(turn)}"
        )
    try:
        _known(turn, TURN_KEYS)
        role = turn.get("role")
        content = turn.get("content")
        if role not in ROLES:
            raise DataError(f"the role is one of {', '.join(ROLES)}, got {quoted(role)}")
        if isinstance(content, str):
            return Message(role, tuple(_marked(role, content, take)))
        if isinstance(content, list | tuple):
            return Message(
                role, tuple(part for entry in content for part in _part(role, entry, take))
            )
        raise DataError(f"`content` is a text or a list of parts, got {quoted(content)}")
    except DataError as error:
        raise DataError(f"turn {place}: {error.message}", kind=error.kind) from None


def _marked(role: str, text: str, take: Callable[[], Media | None]) -> Iterator[str | Media]:
    """Yields the parts of a text, an image from `take` for each mark; answers have no marks."""
    if SURROGATE.search(text):
        raise DataError(
            f"the text {quoted(text)} holds half a surrogate pair, which is no character",
            kind="text",
        )
    for place, piece in enumerate([text] if role == "assistant" else split_marks(text)):
        part = take() if place % 2 else piece
        if part:
            yield part


def _part(role: str, part: Any, take: Callable[[], Media | None]) -> Iterator[str | Media]:
    """Yields one part of a content: text, or an image, its own or the request's next."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        yield from _marked(role, part["text"], take)
        return
    if kind not in ("image", "image_url"):
        raise DataError(
            "a part is of type text, image or image_url, "
            f"got {quoted(part if kind is None else kind)}"
        )
    if role == "assistant":
        raise DataError("an answer has no image")
    image = next(
        (
            part[name]
            for name in ("image", "image_url", "path", "url", "bytes", "base64")
            if part.get(name) is not None
        ),
        None,
    )
    if image is not None and image is part.get("base64"):
        image = f"data:image;base64,{image}"
    media = take() if image is None else image_media(image)
    if media:
        yield media


def image_media(image: Any) -> Media:
    """A media item for an image in any of the supported forms.

    These are a path, a data URL, bytes, a file object, a PIL image, and a uint8 array [H, W],
    [H, W, 3] or [H, W, 4]. Raises `DataError` for anything else. The content of a file is decoded
    later.
    """
    if isinstance(image, Mapping):
        image = next(
            (image[name] for name in ("url", "path", "bytes") if image.get(name) is not None), None
        )
    if isinstance(image, bytes | bytearray | memoryview):
        return Media(bytes(image))
    if isinstance(image, str) and image[:5].lower() == "data:":
        return Media(data_url(image))
    if isinstance(image, str) and image.lower().startswith(("http://", "https://")):
        raise DataError(
            f"the image {quoted(image)} is a URL, and nothing is fetched: "
            "download it and give its path",
            kind="unsupported",
        )
    if isinstance(image, str | Path):
        return Media(_file(image))
    if hasattr(image, "read"):
        data = image.read()
        if isinstance(data, bytes):
            return Media(data)
    if hasattr(image, "__array_interface__") and not hasattr(image, "mode"):
        return _encoded(_of_array(image))
    if hasattr(image, "mode") and hasattr(image, "save"):
        return _encoded(image)
    raise DataError(f"an image is {IMAGE_KINDS}, got {quoted(image)}")


def _file(path: str | Path) -> Path:
    try:
        if Path(path).is_file():
            return Path(path)
    except (OSError, ValueError):  # too long, or a NUL byte
        pass
    raise DataError(f"no image file {quoted(str(path))}")


def _of_array(array: Any) -> Any:
    import numpy as np
    from PIL import Image

    values = np.asarray(array)
    if values.dtype != np.uint8:
        raise DataError(f"an image's array is uint8 from 0 to 255, got {values.dtype}")
    if (
        values.ndim not in (2, 3)
        or (values.ndim == 3 and values.shape[2] not in (3, 4))
        or 0 in values.shape
    ):
        raise DataError(
            f"an image's array is [H, W], [H, W, 3] or [H, W, 4], got {list(values.shape)}"
        )
    return Image.fromarray(values)


def _encoded(image: Any) -> Media:
    """Encodes a PIL image, with its EXIF rotation applied.

    Neither PNG nor TIFF keeps the EXIF rotation of an opened photo.
    """
    if 0 in image.size:
        raise DataError(f"an image of {image.size[0]}x{image.size[1]} pixels has none")
    if image.mode in ("HSV", "LAB", "YCbCr"):
        image = image.convert("RGB")
    buffer = io.BytesIO()
    try:
        upright(image).save(buffer, format="PNG" if image.mode in PLAIN_MODES else "TIFF")
    # Raised for a truncated file that was opened, and for modes that neither format supports.
    except (OSError, ValueError) as error:
        raise DataError(
            f"the PIL image of mode {image.mode} can't be read: {reason_of(error)}",
            kind="image_unreadable",
        ) from None
    return Media(buffer.getvalue())
