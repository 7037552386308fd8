"""Messages JSONL: `messages` with role/content turns and `images`, as OpenAI and Hugging Face write them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_tune.config import MessagesSource
from vlm_tune.data.sources.rows import BadRows, ImageFolder, checked, convert, json_rows
from vlm_tune.data.types import Conversation, Media, Message
from vlm_tune.errors import DataError


def read_messages(config: MessagesSource, seed: int, bad: BadRows) -> Iterator[Conversation]:
    """Conversations of a messages file.

    A content is text, or a list of parts {"type": "text", "text"} and {"type": "image"}; each image part takes the
    next of `images`. Where no part places an image, all images come first in the first question.
    """
    path = Path(config.path)
    images = ImageFolder(Path(config.image_root) if config.image_root else path.parent)

    def make(number: int, row: dict[str, Any]) -> Conversation:
        turns = row.get("messages")
        if not isinstance(turns, list) or not turns:
            raise DataError("no list `messages`")
        names = row.get("images") or []
        if not isinstance(names, list):
            raise DataError("`images` is a list of paths")
        found = [images.find(name) for name in names]
        media = iter(found)
        messages = [_message(place, turn, media) for place, turn in enumerate(turns, 1)]
        left = list(media)
        if left and len(left) == len(found):
            first = next((index for index, message in enumerate(messages) if message.role == "user"), None)
            if first is None:
                raise DataError("images and no question")
            messages[first] = Message("user", (*left, *messages[first].parts))
        elif left:
            raise DataError(f"{len(found)} images and {len(found) - len(left)} image parts")
        return checked(f"{path.stem}:{row.get('id', number)}:{number}", messages)

    return convert(json_rows(path), make, str(path), bad)


def _message(place: int, turn: Any, media: Iterator[Media]) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise DataError(f"turn {place}: no `role`")
    content = turn.get("content")
    if isinstance(content, str):
        return Message(turn["role"], (content,) if content else ())
    if not isinstance(content, list):
        raise DataError(f"turn {place}: `content` is text or a list of parts, got {type(content).__name__}")
    parts: list[str | Media] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif kind == "image":
            item = next(media, None)
            if item is None:
                raise DataError(f"turn {place}: more image parts than images")
            parts.append(item)
        else:
            raise DataError(f"turn {place}: a part is of type text or image, got {kind!r}")
    return Message(turn["role"], tuple(parts))
