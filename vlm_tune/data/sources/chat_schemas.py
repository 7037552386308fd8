"""Forms of rows that hold a conversation: turns with their images and videos."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vlm_tune.data.chat.reasoning import FIELDS as REASONING
from vlm_tune.data.sources.fields import is_empty
from vlm_tune.data.sources.media import MediaFinder
from vlm_tune.data.sources.media_places import Parts, Row, RowMedia, marked_parts, with_media
from vlm_tune.data.types import Media, Message
from vlm_tune.errors import DataError
from vlm_tune.quoting import quoted, reason_of

NAMES = {
    "human": "user",
    "user": "user",
    "observation": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
}
"""Roles by the speakers' names in from/value turns; a tool's output takes the user's place."""

TOOL_ROLES = ("tool", "function", "ipython", "observation", "function_call")

LISTS = (
    "conversations",
    "messages",
    "texts",
    "images",
    "videos",
    "answers",
    "candidates",
    "choices",
    "options",
    "history",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "rejected_messages",
)
"""Fields that hold lists; tables store them as JSON text where a column can't hold a list."""

UNSUPPORTED_IN_TURNS = (
    *("tool_calls", "tool_call_id", "function_call", "tools", "refusal"),
    *("name", "audio", "audios", "image", "images", "video", "videos", "loss_scale", "mask"),
)
"""Fields of a turn that carry meaning, and that no chat format here renders."""


OWN_MEDIA = (
    *("image", "image_url", "video", "video_url", "audio", "audio_url", "input_audio"),
    *("path", "url", "bytes"),
)
"""Fields of a content part that hold the part's own image, video or audio."""
PART_KINDS = ("image", "image_url", "video", "video_url", "audio", "audio_url", "input_audio")
"""Types of content parts with media; `input_audio` is OpenAI's."""


def turns_of(row: Row, name: str, expected: str = "list") -> Sequence[Row]:
    """The row's list of turns, which Arrow may store as an object of lists.

    `expected` says in errors what else the field may be.
    """
    turns = row.get(name)
    if isinstance(turns, Mapping) and all(isinstance(column, list) for column in turns.values()):
        columns: list[list[Any]] = list(turns.values())
        if len({len(column) for column in columns}) == 1:
            turns = [dict(zip(turns, values, strict=True)) for values in zip(*columns, strict=True)]
    if not isinstance(turns, list) or not turns:
        got = "" if is_empty(turns) else f" of turns, got {quoted(turns)}"
        raise DataError(f"no {expected} `{name}`{got}", kind="missing_field")
    for place, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping):
            raise DataError(
                f"{name}, turn {place}: a turn must be an object, got {quoted(turn)}", kind="field"
            )
        for field in UNSUPPORTED_IN_TURNS:
            if not is_empty(turn.get(field)):
                advice = "take it out, write it into the text, or name it in the source's `ignore`"
                raise DataError(
                    f"{name}, turn {place}: `{field}` is not supported ({advice})",
                    kind="unsupported",
                )
    return turns


def _trained(turn: Row, place: int) -> bool:
    """Whether an answer is trained on: not with `weight: 0`, `train: false` or `loss: false`."""
    weight = turn.get("weight")
    train = turn.get("train")
    loss = turn.get("loss")
    if train is not None and not isinstance(train, bool):
        raise DataError(
            f"turn {place}: `train` must be true or false, got {quoted(train)}", kind="field"
        )
    for name, value in (("weight", weight), ("loss", loss)):
        if value is not None and not (isinstance(value, int | float) and value in (0, 1)):
            raise DataError(
                f"turn {place}: `{name}` must be 0 or 1, got {quoted(value)}", kind="field"
            )
    return (weight is None or weight == 1) and train is not False and (loss is None or loss == 1)


def reasoning_of(turn: Row, role: str = "assistant") -> str:
    """The reasoning before an answer, in whichever field of a turn or row; empty if there is none.

    Raises `DataError` if it is no text, differs from field to field, or is another role's.
    """
    given = {name: turn[name] for name in REASONING if not is_empty(turn.get(name))}
    if not given:
        return ""
    (name, text), *others = given.items()
    if role != "assistant":
        raise DataError(f"`{name}` in a turn of the {role}'s", kind="field")
    if not isinstance(text, str):
        raise DataError(f"`{name}` must be text, got {quoted(text)}", kind="field")
    different = next((other for other, value in others if value != text), None)
    if different is not None:
        raise DataError(
            f"`{name}` and `{different}` differ: name one in the source's `ignore`",
            kind="field",
        )
    return text


def with_system(row: Row, messages: list[Message]) -> list[Message]:
    """The turns, preceded by the row's `system` text if it has one."""
    system = row.get("system")
    if is_empty(system):
        return messages
    if not isinstance(system, str):
        raise DataError(f"`system` must be text, got {quoted(system)}", kind="field")
    if messages and messages[0].role == "system":
        raise DataError("a `system` text and a system turn", kind="turns")
    return [Message("system", (system,)), *messages]


# --- the forms ------------------------------------------------------------------------------------


def from_value_turns(row: Row, finder: MediaFinder) -> list[Message]:
    """LLaVA and ShareGPT rows: `conversations` of from/value turns; every image has its mark."""
    media = RowMedia(row, finder)
    messages = []
    for place, turn in enumerate(turns_of(row, "conversations"), 1):
        if not isinstance(turn.get("value"), str):
            raise DataError(
                f"turn {place}: no text `value`, got {quoted(turn.get('value'))}",
                kind="missing_field",
            )
        role = NAMES.get(str(turn.get("from")))
        if role is None:
            raise DataError(
                f"turn {place}: from {quoted(turn.get('from'))} is not one of {', '.join(NAMES)}",
                kind="role",
            )
        parts = text_parts(turn["value"], role, media)
        reasoning = reasoning_of(turn, role)
        messages.append(Message(role, parts, _trained(turn, place), reasoning))
    return with_system(row, with_media(messages, media, always=True))


def text_parts(text: str, role: str, media: RowMedia) -> Parts:
    """The parts of a turn's text; in an answer, marks are plain text and not places of images."""
    if role == "assistant":
        return (text,) if text else ()
    return marked_parts(text, media)


def role_content_turns(row: Row, finder: MediaFinder) -> list[Message]:
    """OpenAI and Hugging Face rows: `messages` of role/content turns.

    Content parts may carry their own image or video.
    """
    media = RowMedia(row, finder)
    messages = messages_of(turns_of(row, "messages"), media)
    return with_system(row, with_media(messages, media))


def prompt_completion(row: Row, finder: MediaFinder) -> list[Message]:
    """Rows of `prompt` and `completion`, each a text or role/content turns.

    Answers inside the prompt carry no loss.
    """
    media = RowMedia(row, finder)
    messages: list[Message] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = row.get(name)
        if isinstance(value, str):
            messages.append(Message(role, text_parts(value, role, media)))
        else:
            messages += messages_of(
                turns_of(row, name, "text or list"),
                media,
                after=len(messages),
                context=name == "prompt",
            )
    return with_system(row, with_media(messages, media))


def cauldron(row: Row, finder: MediaFinder) -> list[Message]:
    """The Cauldron rows: `texts` of {"user", "assistant"} turns about `images`."""
    media = RowMedia(row, finder)
    messages: list[Message] = []
    for place, turn in enumerate(turns_of(row, "texts"), 1):
        for role in ("user", "assistant"):
            if not isinstance(turn.get(role), str):
                raise DataError(
                    f"texts, turn {place}: no text `{role}`, got {quoted(turn.get(role))}",
                    kind="missing_field",
                )
            messages.append(
                Message(
                    role,
                    text_parts(turn[role], role, media),
                    role == "user" or _trained(turn, place),
                    reasoning_of(turn, role) if role == "assistant" else "",
                )
            )
    return with_system(row, with_media(messages, media))


def alpaca(row: Row, finder: MediaFinder) -> list[Message]:
    """Alpaca rows: `instruction`, `input` and `output`, after a `history` of (question, answer)."""
    media = RowMedia(row, finder)
    history = [] if is_empty(row.get("history")) else row["history"]
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    ):
        raise DataError("`history` is a list of [question, answer]", kind="field")
    instruction = row.get("instruction")
    more = row.get("input")
    if not isinstance(instruction, str) or not isinstance(more, str | None):
        raise DataError("no text `instruction` (and `input`)", kind="missing_field")
    question = "\n".join(text for text in (instruction, more) if text)
    messages: list[Message] = []
    for prompt, answer in [*history, (question, row.get("output"))]:
        if not isinstance(prompt, str) or not isinstance(answer, str):
            raise DataError("an instruction or an output that is no text", kind="missing_field")
        messages += [Message("user", marked_parts(prompt, media)), Message("assistant", (answer,))]
    return with_system(row, with_media(messages, media))


PYTHON_LIST = 20_000
"""Longest list in Python syntax that is parsed, in characters."""

CHAT_FORMS: dict[str, Callable[[Row, MediaFinder], list[Message]]] = {
    "llava": from_value_turns,
    "sharegpt": from_value_turns,
    "messages": role_content_turns,
    "prompt_completion": prompt_completion,
    "alpaca": alpaca,
    "cauldron": cauldron,
}


# --- role/content turns ---------------------------------------------------------------------------


def messages_of(
    turns: Sequence[Row], media: RowMedia, *, after: int = 0, context: bool = False
) -> list[Message]:
    """The messages of role/content turns.

    Args:
        turns: The turns.
        media: The row's images and videos.
        after: The number of turns before these, for error messages.
        context: Whether the turns are a prompt, whose answers carry no loss.
    """
    messages = []
    for place, turn in enumerate(turns, after + 1):
        if not isinstance(turn.get("role"), str):
            raise DataError(f"turn {place}: no `role`, got {quoted(turn.get('role'))}", kind="role")
        role = turn["role"]
        content = turn.get("content")
        if role in TOOL_ROLES:
            raise DataError(
                f"turn {place}: the role {quoted(role)}: tools are not supported",
                kind="unsupported",
            )
        trained = _trained(turn, place) and not (context and role == "assistant")
        if isinstance(content, str):
            parts = text_parts(content, role, media)
        elif isinstance(content, list):
            parts = tuple(
                part for entry in content for part in _content_part(place, role, entry, media)
            )
        else:
            raise DataError(
                f"turn {place}: `content` must be text or a list of parts, got {quoted(content)}",
                kind="field",
            )
        messages.append(Message(role, parts, trained, reasoning_of(turn, role)))
    return messages


def _content_part(place: int, role: str, part: Any, media: RowMedia) -> Iterator[str | Media]:
    """One content part: text, or a media item, the part's own or the row's next."""
    if not isinstance(part, Mapping):
        raise DataError(
            f"turn {place}: a part must be an object with a `type`, got {quoted(part)}",
            kind="field",
        )
    kind = part.get("type")
    text = part.get("text")
    sources = {name: part[name] for name in OWN_MEDIA if not is_empty(part.get(name))}
    if kind == "text":
        if not isinstance(text, str) or sources:
            actual = f"`{next(iter(sources))}` beside it" if sources else quoted(text)
            raise DataError(
                f"turn {place}: a part of type text has a `text` and nothing else, got {actual}",
                kind="field",
            )
        yield from text_parts(text, role, media)
        return
    if kind not in PART_KINDS:
        unsupported = isinstance(kind, str)
        message = (
            f"turn {place}: a part is text, image, image_url, video, audio or input_audio, "
            f"got {quoted(kind)}"
        )
        raise DataError(message, kind="unsupported" if unsupported else "field")
    if not is_empty(text):
        raise DataError(
            f"turn {place}: a part of type {kind} with a `text`: write it as a part of its own",
            kind="field",
        )
    modality = kind.removesuffix("_url").removeprefix("input_")
    names = (modality, f"{modality}_url", f"input_{modality}", "path", "url", "bytes")
    source = next((sources[name] for name in names if name in sources), None)
    if source is None and part.get("index") is not None:
        yield media.take_numbered(modality, part["index"])
    elif source is None:
        yield from media.take(modality)
    else:
        yield media.finder.item(modality, source)


def decoded_lists(row: Row) -> dict[str, Any]:
    """The row, with lists that its container stores as text decoded.

    The text is JSON; for choices it may be a Python list, as in some data sets on the Hub.
    """
    out = dict(row)
    for name in LISTS:
        value = out.get(name)
        if isinstance(value, str) and value.lstrip().startswith("["):
            out[name] = _list_of(name, value)
    return out


def _list_of(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        message = f"`{name}` is a list, and its text is not JSON: {reason_of(error)}"
    if name in ("choices", "options", "candidates") and len(text) <= PYTHON_LIST:
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass
    raise DataError(message, kind="not_json")
