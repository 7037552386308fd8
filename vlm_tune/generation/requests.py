"""Converts chat requests, with their turns, images and audio, into conversations."""

from __future__ import annotations

import difflib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from vlm_tune.data.chat.image_marks import split_marks
from vlm_tune.data.chat.reasoning import FIELDS
from vlm_tune.data.images.decode import upright
from vlm_tune.data.sources.legible import SURROGATE
from vlm_tune.data.sources.media import base64_bytes, data_url
from vlm_tune.data.types import ROLES, Conversation, Media, Message
from vlm_tune.errors import ArgumentError, DataError
from vlm_tune.quoting import quoted, reason_of

KEYS = ("prompt", "messages", "image", "images", "audio", "audios")
TURN_KEYS = ("role", "content", *FIELDS)
PLAIN_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""PIL modes that PNG supports; images of other modes are encoded as TIFF."""
IMAGE_KINDS = "a path, a data URL, bytes, a file object, a PIL image or a uint8 array"
AUDIO_KINDS = "a path, a data URL, bytes or a file object"
PART_KINDS = {
    "image": "image",
    "image_url": "image",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
}
"""The modalities of content parts by their types."""


def request_conversation(number: int, request: Any) -> Conversation:
    """Converts one request to a conversation.

    Places of images are `<image>` marks in questions and system texts, and image parts without an
    image of their own. They take the request's images in order. Without any place the images go
    before the first question. For audio it is the same: `<audio>` is a mark where a request has
    audio.

    Args:
        number: The number of the request, from 1, for messages and the conversation's id.
        request: A text, or `{"prompt" or "messages": ..., "image" or "images": ...}`, perhaps with
            "audio" or "audios". A prompt is a text, messages are turns `{"role", "content"}` whose
            contents are texts or lists of parts; either may be the other.

    Raises:
        DataError: The request has another form, an image is unreadable, or the numbers of places
            and images differ.
    """
    try:
        messages = _messages(request)
    except DataError as error:
        raise DataError(f"request {number}: {error.message}", kind=error.kind) from None
    places = {kind: count(1) for kind in KINDS}

    def labelled(part: str | Media) -> str | Media:
        if isinstance(part, str):
            return part
        kind = part.modality
        return replace(part, label=f"request {number}: {kind} {next(places[kind])}")

    for place, message in enumerate(messages):
        messages[place] = replace(message, parts=tuple(map(labelled, message.parts)))
    return Conversation(f"request {number}", tuple(messages), row=number)


def check_text(name: str, text: Any) -> None:
    """Raises `ArgumentError` unless an argument, called `name`, is a text of whole characters."""
    if not isinstance(text, str):
        raise ArgumentError(f"{name} must be a string, got {quoted(text)}")
    if SURROGATE.search(text):
        raise ArgumentError(
            f"{name} must be valid Unicode text, got half a surrogate pair (or a byte "
            f"that is no UTF-8) in {quoted(text)}"
        )


def _messages(request: Any) -> list[Message]:
    if isinstance(request, str):
        request = {"prompt": request}
    if not isinstance(request, Mapping):
        raise DataError(
            'a request must be a string or {"prompt": ..., "images": [...]}, '
            f"got {quoted(request)}"
        )
    _known(request, KEYS)
    if ("prompt" in request) == ("messages" in request):
        raise DataError("a request has a `prompt`, or in its place `messages`")
    media = _RequestMedia(request)
    prompt = request.get("prompt", request.get("messages"))
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(turns, Sequence) or isinstance(turns, bytes) or not turns:
        raise DataError(f"a prompt must be a string or a list of turns, got {quoted(prompt)}")
    messages = [_message(place, turn, media) for place, turn in enumerate(turns, 1)]
    first = next((place for place, message in enumerate(messages) if message.role == "user"), None)
    if first is None or messages[-1].role != "user":
        raise DataError("a chat ends with the user's turn")
    messages[first] = Message("user", (*media.unplaced(), *messages[first].parts))
    return messages


class _RequestMedia:
    """A request's media by kind, which the places for them take in order."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        self.items: dict[str, list[Media]] = {}
        for kind, media_of in MEDIA_OF.items():
            several = f"{kind}s"
            if request.get(kind) is not None and request.get(several) is not None:
                raise DataError(f"both `{kind}` and `{several}`")
            given = request.get(several) if request.get(kind) is None else request[kind]
            self.items[kind] = [media_of(one) for one in _listed(given)]
        self.places = dict.fromkeys(self.items, 0)

    @property
    def marks(self) -> list[str]:
        """The kinds whose marks in texts are places: images, and audio where there is some."""
        return [kind for kind, items in self.items.items() if kind == "image" or items]

    def take(self, kind: str) -> Media | None:
        """The next item of a kind; None once none is left, which `unplaced` reports."""
        place = self.places[kind]
        self.places[kind] += 1
        return self.items[kind][place] if place < len(self.items[kind]) else None

    def unplaced(self) -> list[Media]:
        """All items of the kinds that have no place.

        Raises `DataError` where a kind's places and items differ in number.
        """
        left: list[Media] = []
        for kind, items in self.items.items():
            places = self.places[kind]
            if not places:
                left += items
            elif places != len(items):
                advice = rf"; \<{kind}> is the text itself" if places > len(items) else ""
                raise DataError(
                    f"{len(items)} {kind}s and {places} <{kind}> marks or parts for them{advice}",
                    kind="image_count",
                )
        return left


def _known(given: Mapping[Any, Any], keys: Sequence[str]) -> None:
    for key in given:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, 1)
            advice = f"did you mean `{near[0]}`?" if near else f"expected one of {', '.join(keys)}"
            raise DataError(f"unknown key {quoted(key)}; {advice}")


def _listed(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


def _message(place: int, turn: Any, media: _RequestMedia) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(
            f"turn {place}: a turn must be a mapping with role and content, got {quoted(turn)}"
        )
    try:
        _known(turn, TURN_KEYS)
        role = turn.get("role")
        content = turn.get("content")
        if role not in ROLES:
            raise DataError(f"the role must be one of {', '.join(ROLES)}, got {quoted(role)}")
        reasoning = _reasoning(role, turn)
        if isinstance(content, str):
            return Message(role, tuple(_marked(role, content, media)), reasoning=reasoning)
        if isinstance(content, list | tuple):
            parts = tuple(part for entry in content for part in _part(role, entry, media))
            return Message(role, parts, reasoning=reasoning)
        raise DataError(f"`content` must be a string or a list of parts, got {quoted(content)}")
    except DataError as error:
        raise DataError(f"turn {place}: {error.message}", kind=error.kind) from None


def _reasoning(role: str, turn: Mapping[str, Any]) -> str:
    """The reasoning before an earlier answer, which a model reads if its chat format keeps it."""
    name, text = next(((name, turn[name]) for name in FIELDS if turn.get(name)), ("", ""))
    if not isinstance(text, str):
        raise DataError(f"`{name}` must be a string, got {quoted(text)}")
    if text and role != "assistant":
        raise DataError(f"`{name}` in a turn of the {role}'s")
    check_text(f"`{name}`", text)
    return text


def _marked(role: str, text: str, media: _RequestMedia) -> Iterator[str | Media]:
    """Yields the parts of a text, the next of `media` for each mark; answers have no marks."""
    if SURROGATE.search(text):
        raise DataError(
            f"the text {quoted(text)} contains half of a surrogate pair, which is not a character",
            kind="text",
        )
    pieces = [text] if role == "assistant" else split_marks(text, media.marks)
    for place, piece in enumerate(pieces):
        part = media.take(piece) if place % 2 else piece
        if part:
            yield part


def _part(role: str, part: Any, media: _RequestMedia) -> Iterator[str | Media]:
    """Yields one part of a content: text, or an image or audio, its own or the request's next."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        yield from _marked(role, part["text"], media)
        return
    modality = PART_KINDS.get(kind) if isinstance(kind, str) else None
    if modality is None:
        raise DataError(
            "a part must be text, image, image_url, audio or input_audio, got "
            f"{quoted(part if kind is None else kind)}"
        )
    if role == "assistant":
        raise DataError(f"an answer has no {modality}")
    names = (modality, f"{modality}_url", f"input_{modality}", "path", "url", "bytes", "base64")
    given = next((part[name] for name in names if part.get(name) is not None), None)
    if given is not None and given is part.get("base64"):
        given = f"data:{modality};base64,{given}"
    item = media.take(modality) if given is None else MEDIA_OF[modality](given)
    if item:
        yield item


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
    source = _source(image, "image")
    if source is not None:
        return Media(source)
    if hasattr(image, "__array_interface__") and not hasattr(image, "mode"):
        return _encoded(_of_array(image))
    if hasattr(image, "mode") and hasattr(image, "save"):
        return _encoded(image)
    raise DataError(f"an image must be {IMAGE_KINDS}, got {quoted(image)}")


def audio_media(audio: Any) -> Media:
    """A media item for audio: a path, a data URL, bytes, a file object, or OpenAI's `input_audio`.

    Raises `DataError` for anything else. The content of a file is decoded later.
    """
    given = audio
    if isinstance(audio, Mapping):
        given = next(
            (audio[name] for name in ("url", "path", "bytes") if audio.get(name) is not None), None
        )
        if isinstance(audio.get("data"), str):
            given = base64_bytes(audio["data"], "audio")
    source = _source(given, "audio")
    if source is None:
        raise DataError(f"audio must be {AUDIO_KINDS}, got {quoted(audio)}")
    return Media(source, modality="audio")


MEDIA_OF: dict[str, Callable[[Any], Media]] = {"image": image_media, "audio": audio_media}
KINDS = tuple(MEDIA_OF)


def _source(given: Any, what: str) -> Path | bytes | None:
    """The file or the bytes of a media item that is given encoded; None for other forms."""
    if isinstance(given, bytes | bytearray | memoryview):
        return bytes(given)
    if isinstance(given, str) and given[:5].lower() == "data:":
        return data_url(given, what)
    if isinstance(given, str) and given.lower().startswith(("http://", "https://")):
        raise DataError(
            f"the {what} {quoted(given)} is a URL, and URLs are not fetched: download it and give "
            "its path",
            kind="unsupported",
        )
    if isinstance(given, str | Path):
        return _file(given, what)
    data = given.read() if hasattr(given, "read") else None
    return data if isinstance(data, bytes) else None


def _file(path: str | Path, what: str) -> Path:
    try:
        if Path(path).is_file():
            return Path(path)
    except (OSError, ValueError):  # too long, or a NUL byte
        pass
    raise DataError(f"no {what} file {quoted(str(path))}")


def _of_array(array: Any) -> Any:
    import numpy as np
    from PIL import Image

    values = np.asarray(array)
    if values.dtype != np.uint8:
        raise DataError(f"an image's array must be uint8 from 0 to 255, got {values.dtype}")
    if (
        values.ndim not in (2, 3)
        or (values.ndim == 3 and values.shape[2] not in (3, 4))
        or 0 in values.shape
    ):
        raise DataError(
            f"an image's array must be [H, W], [H, W, 3] or [H, W, 4], got {list(values.shape)}"
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
