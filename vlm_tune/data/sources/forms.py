"""What a row can look like when it holds a conversation: turns with their images and videos."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vlm_tune.data.marks import split_marks
from vlm_tune.data.sources.media import MediaFinder
from vlm_tune.data.types import Media, Message
from vlm_tune.errors import DataError

Row = Mapping[str, Any]
Parts = tuple[str | Media, ...]

NAMES = {
    "human": "user",
    "user": "user",
    "observation": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
}
"""Who speaks, as rows with from/value turns call them; what a tool returns stands where a question stands."""

LISTS = ("conversations", "messages", "images", "videos", "answers", "candidates", "choices", "history")
"""Fields that hold lists; tables keep them as JSON text where a column can't."""


class RowMedia:
    """A row's images and videos, taken in order by the places that the text has for them."""

    def __init__(self, row: Row, finder: MediaFinder) -> None:
        if row.get("audios") or row.get("audio"):
            raise DataError("the row has audio, which no model here hears", kind="unsupported")
        self.finder = finder
        self.items: dict[str, list[Parts]] = {
            "image": [(finder.image(value),) for value in _listed(row, "image")],
            "video": [finder.video(value) for value in _listed(row, "video")],
        }
        self.taken = {"image": 0, "video": 0}

    def take(self, kind: str, place: str) -> Parts:
        """The next image or video. Raises `DataError` if there is none left."""
        number = self.taken[kind]
        if number >= len(self.items[kind]):
            raise DataError(f"more {place} than {kind}s", kind="image_count")
        self.taken[kind] += 1
        return self.items[kind][number]

    def rest(self, place: str) -> Parts:
        """All parts, if no place took any. Raises `DataError` if some were taken and some were not."""
        for kind, items in self.items.items():
            if self.taken[kind] not in (0, len(items)):
                raise DataError(f"{len(items)} {kind}s and {self.taken[kind]} {kind} {place}", kind="image_count")
        left = [parts for kind, items in self.items.items() if not self.taken[kind] for parts in items]
        return tuple(part for parts in left for part in parts)


def _listed(row: Row, kind: str) -> list[Any]:
    """The values of `image` or `images` (`video` or `videos`); a `video` that is a list is one video's frames."""
    one, several = row.get(kind), row.get(f"{kind}s")
    if one is not None and several is not None:
        raise DataError(f"both `{kind}` and `{kind}s`", kind="field")
    if several is not None and not isinstance(several, list):
        raise DataError(f"`{kind}s` is a list, got {type(several).__name__}", kind="field")
    if one is None:
        return list(several or [])
    return list(one) if isinstance(one, list) and kind == "image" else [one]


# --- texts with marks ------------------------------------------------------------------------------------------------


def marked_parts(text: str, media: RowMedia) -> Parts:
    """Text with `<image>` marks (and `<video>` in rows with videos), each mark taking the next; see `split_marks`.

    Raises `DataError` when there are more marks than images.
    """
    parts: list[str | Media] = []
    for place, piece in enumerate(split_marks(text, video=bool(media.items["video"]))):
        if place % 2:
            parts += media.take(piece, f"<{piece}> marks")
        elif piece:
            parts.append(piece)
    return tuple(parts)


def _all_marked(media: RowMedia) -> None:
    for kind, items in media.items.items():
        if media.taken[kind] < len(items):
            raise DataError(f"{len(items)} {kind}s and fewer <{kind}> marks in the questions ({media.taken[kind]})", kind="image_count")


def _turns(row: Row, name: str) -> Sequence[Row]:
    """The row's list of turns; Arrow may keep it as an object of lists."""
    found = row.get(name)
    if isinstance(found, Mapping) and all(isinstance(column, list) for column in found.values()):
        columns: list[list[Any]] = list(found.values())
        if len({len(column) for column in columns}) == 1:
            found = [dict(zip(found, values, strict=True)) for values in zip(*columns, strict=True)]
    if not isinstance(found, list) or not found:
        raise DataError(f"no list `{name}`", kind="missing_field")
    for place, turn in enumerate(found, 1):
        if not isinstance(turn, Mapping):
            raise DataError(f"{name}, turn {place}: a turn is an object, got {type(turn).__name__}", kind="field")
    return found


def _trained(turn: Row, place: int) -> bool:
    """Whether an answer carries loss: not with `weight: 0` or `train: false`."""
    weight, train = turn.get("weight"), turn.get("train")
    if weight is not None and not (isinstance(weight, int | float) and weight in (0, 1)):
        raise DataError(f"turn {place}: `weight` is 0 or 1, got {weight!r:.50}", kind="field")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"turn {place}: `train` is true or false, got {train!r:.50}", kind="field")
    return weight != 0 and train is not False


def _with_system(row: Row, messages: list[Message]) -> list[Message]:
    """The turns after the row's `system` text."""
    system = row.get("system")
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise DataError(f"`system` is text, got {type(system).__name__}", kind="field")
    if messages and messages[0].role == "system":
        raise DataError("a `system` text and a system turn", kind="turns")
    return [Message("system", (system,)), *messages]


def _with_first(messages: list[Message], first: Parts) -> list[Message]:
    """The turns with media that have no place of their own put first in the first question."""
    if not first:
        return messages
    place = next((place for place, message in enumerate(messages) if message.role == "user"), None)
    if place is None:
        raise DataError("images and no question", kind="turns")
    return [*messages[:place], Message("user", (*first, *messages[place].parts)), *messages[place + 1 :]]


# --- the forms -------------------------------------------------------------------------------------------------------


def from_value_turns(row: Row, finder: MediaFinder) -> list[Message]:
    """LLaVA's and ShareGPT's rows: `conversations` of from/value turns; marks in questions are places of images."""
    if row.get("tools"):
        raise DataError("the row has `tools`, which no chat format here can tell a model of", kind="unsupported")
    media = RowMedia(row, finder)
    messages = []
    for place, turn in enumerate(_turns(row, "conversations"), 1):
        if not isinstance(turn.get("value"), str):
            raise DataError(f"turn {place}: no text `value`", kind="missing_field")
        role = NAMES.get(str(turn.get("from")))
        if role is None:
            raise DataError(f"turn {place}: from {turn.get('from')!r:.100} is none of {', '.join(NAMES)}", kind="role")
        # Only a question's marks are places of images; an answer that says <image> says just that.
        parts = marked_parts(turn["value"], media) if role == "user" else (turn["value"],)
        messages.append(Message(role, parts, _trained(turn, place)))
    _all_marked(media)
    return _with_system(row, messages)


def role_content_turns(row: Row, finder: MediaFinder) -> list[Message]:
    """OpenAI's and Hugging Face's rows: `messages` of role/content turns; parts may carry their own image or video."""
    media = RowMedia(row, finder)
    messages = _messages(_turns(row, "messages"), media)
    return _with_system(row, _with_first(messages, media.rest("parts")))


def prompt_completion(row: Row, finder: MediaFinder) -> list[Message]:
    """`prompt` and `completion`, each a text or role/content turns; what the prompt says carries no loss."""
    media = RowMedia(row, finder)
    messages: list[Message] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = row.get(name)
        if isinstance(value, str):
            messages.append(Message(role, (value,) if value else ()))
        else:
            messages += _messages(_turns(row, name), media, after=len(messages), context=name == "prompt")
    return _with_system(row, _with_first(messages, media.rest("parts")))


def alpaca(row: Row, finder: MediaFinder) -> list[Message]:
    """`instruction`, `input` and `output`, after `history`, pairs of a question and its answer."""
    media = RowMedia(row, finder)
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError("`history` is a list of [question, answer]", kind="field")
    instruction, more = row.get("instruction"), row.get("input")
    if not isinstance(instruction, str) or not isinstance(more, str | None):
        raise DataError("no text `instruction` (and `input`)", kind="missing_field")
    question = "\n".join(text for text in (instruction, more) if text)
    messages: list[Message] = []
    for asked, answer in [*history, (question, row.get("output"))]:
        if not isinstance(asked, str) or not isinstance(answer, str):
            raise DataError("an instruction or an output that is no text", kind="missing_field")
        messages += [Message("user", marked_parts(asked, media)), Message("assistant", (answer,))]
    return _with_system(row, _with_first(messages, media.rest("marks")))


CHAT_FORMS: dict[str, Callable[[Row, MediaFinder], list[Message]]] = {
    "llava": from_value_turns,
    "sharegpt": from_value_turns,
    "messages": role_content_turns,
    "prompt_completion": prompt_completion,
    "alpaca": alpaca,
}


# --- role/content turns ----------------------------------------------------------------------------------------------


def _messages(turns: Sequence[Row], media: RowMedia, *, after: int = 0, context: bool = False) -> list[Message]:
    messages = []
    for place, turn in enumerate(turns, after + 1):
        if not isinstance(turn.get("role"), str):
            raise DataError(f"turn {place}: no `role`", kind="role")
        role, content = turn["role"], turn.get("content")
        trained = _trained(turn, place) and not (context and role == "assistant")
        if isinstance(content, str):
            parts = (content,) if content else ()
        elif isinstance(content, list):
            parts = tuple(part for given in content for part in _content_part(place, given, media))
        else:
            raise DataError(f"turn {place}: `content` is text or a list of parts, got {type(content).__name__}", kind="field")
        messages.append(Message(role, parts, trained))
    return messages


def _content_part(place: int, part: Any, media: RowMedia) -> Iterator[str | Media]:
    """One part of a content: text, an image or a video, its own or the row's next."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        yield from ([part["text"]] if part["text"] else [])
        return
    if kind not in ("image", "image_url", "video", "video_url"):
        raise DataError(f"turn {place}: a part is of type text, image, image_url or video, got {kind!r:.100}", kind="field")
    modality = kind.removesuffix("_url")
    own = next((part[name] for name in (modality, f"{modality}_url", "path", "url", "bytes") if part.get(name) is not None), None)
    if own is None:
        yield from media.take(modality, f"{modality} parts")
    elif modality == "image":
        yield media.finder.image(own)
    else:
        yield from media.finder.video(own)


def decoded_lists(row: Row) -> dict[str, Any]:
    """The row with lists that its container keeps as JSON text."""
    out = dict(row)
    for name in LISTS:
        value = out.get(name)
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                out[name] = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise DataError(f"`{name}` is a list, and its text is not JSON: {error}", kind="not_json") from None
    return out
