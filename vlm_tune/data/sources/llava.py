"""LLaVA's JSON: `conversations` with from/value turns, `<image>` marks in the text, and `image`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_tune.config import LlavaSource
from vlm_tune.data.sources.rows import BadRows, ImageFolder, checked, convert, json_rows, marked_parts
from vlm_tune.data.types import Conversation, Message
from vlm_tune.errors import DataError

NAMES = {"human": "user", "gpt": "assistant", "system": "system"}


def read_llava(config: LlavaSource, seed: int, bad: BadRows) -> Iterator[Conversation]:
    """Conversations of a LLaVA JSON or JSONL file."""
    path = Path(config.path)
    images = ImageFolder(Path(config.image_root) if config.image_root else path.parent)

    def make(number: int, row: dict[str, Any]) -> Conversation:
        turns = row.get("conversations")
        if not isinstance(turns, list) or not turns:
            raise DataError("no list `conversations`")
        given = row.get("image")
        names = [] if given is None else given if isinstance(given, list) else [given]
        media = iter([images.find(name) for name in names])
        messages = []
        for place, turn in enumerate(turns, 1):
            if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
                raise DataError(f"turn {place}: no text `value`")
            role = NAMES.get(str(turn.get("from")))
            if role is None:
                raise DataError(f"turn {place}: from {turn.get('from')!r} is none of {', '.join(NAMES)}")
            # Only a question's marks are places of images; an answer that says <image> says just that.
            parts = marked_parts(turn["value"], media) if role == "user" else (turn["value"],)
            messages.append(Message(role, parts))
        if next(media, None) is not None:
            marks = sum(len(message.parts) for message in messages if message.role == "user")
            raise DataError(f"{len(names)} images and fewer <image> marks ({marks} question parts)")
        return checked(f"{path.stem}:{row.get('id', number)}:{number}", messages)

    return convert(json_rows(path), make, str(path), bad)
