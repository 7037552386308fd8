"""Forms of rows in which people judge answers: pairs of answers, and single ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlm_tune.data.sources.chat_schemas import (
    NAMES,
    messages_of,
    text_parts,
    turns_of,
    with_system,
)
from vlm_tune.data.sources.fields import COMPLETIONS, LABELS, PROMPTS, is_empty, judgement
from vlm_tune.data.sources.legible import SURROGATE, is_legible
from vlm_tune.data.sources.media import MediaFinder
from vlm_tune.data.sources.media_places import Row, RowMedia, with_media
from vlm_tune.data.sources.region_fields import has_marks
from vlm_tune.data.types import Media, Message
from vlm_tune.errors import DataError
from vlm_tune.quoting import quoted


@dataclass(frozen=True)
class Judged:
    """A row whose answers people have judged.

    Attributes:
        messages: The turns; the last is the chosen answer, or the one that is judged.
        rejected: The rejected answer; None where one answer is judged.
        desirable: Whether the one answer is liked; None in a pair.
    """

    messages: list[Message]
    rejected: Message | None = None
    desirable: bool | None = None


def check_differ(chosen: Message, rejected: Message) -> None:
    """Raises `DataError` for a chosen answer that equals the rejected one, reasoning included."""
    if chosen.words.strip() == rejected.words.strip():
        raise DataError(
            f"`chosen` and `rejected` are the same answer, {quoted(chosen.words)}",
            kind="equal_answers",
        )


def preference(row: Row, finder: MediaFinder) -> Judged:
    """Rows of `chosen` and `rejected`, after a prompt (`PROMPTS`), or turns that both have.

    As TRL's preference format: each is a text or role/content turns. Both answers are one turn. As
    LLaMA-Factory's: `conversations` or `messages` are the prompt, and each answer is a turn. As
    ms-swift's: `messages` end with the chosen answer, beside `rejected_response` or, whole,
    `rejected_messages`.
    """
    _refuse_history(row)
    turns = _turns_of(row)
    other = None if turns is None else _only_one(row, ("rejected_response", "rejected_messages"))
    names = (LAST_TURN, other or "")
    if turns is not None and other == "rejected_response":
        prompt, chosen, rejected = _before_last(turns), turns[-1:], _completion(row, other)
    elif turns is not None and other == "rejected_messages":
        names = ("messages", other)
        prompt, chosen, rejected = None, turns, _completion(row, other)
    else:
        names = ("chosen", "rejected")
        prompt = _prompt_of(row) if turns is None else turns
        chosen, rejected = (_completion(row, name) for name in ("chosen", "rejected"))
    if prompt is None:
        prompt, chosen, rejected = shared_prompt(chosen, rejected)
        if not prompt:
            raise DataError(
                f"no `prompt` (or `question`), and `{names[0]}` and `{names[1]}` begin with no "
                "turn that they share",
                kind="missing_field",
            )
    media = RowMedia(row, finder)
    messages = _context(prompt, media)
    answers = [
        _one_answer(name, completion, media)
        for name, completion in zip(names, (chosen, rejected), strict=True)
    ]
    # Those with marks are compared once their boxes stand in place of them.
    if not has_marks(answers[0].text):
        check_differ(*answers)
    whole = with_system(row, with_media([*messages, answers[0]], media))
    return Judged(whole, rejected=answers[1])


def unpaired_preference(row: Row, finder: MediaFinder) -> Judged:
    """Rows of a prompt (`PROMPTS`), `completion` and `label`: whether the answer is liked.

    Or of `messages` or `conversations` that end with the answer, and `label`. LLaMA-Factory's
    names of the latter two are `output` and `kto_tag`.
    """
    field = _only_one(row, LABELS) or LABELS[0]
    liked = judgement(row.get(field))
    if liked is None:
        raise DataError(
            f"`{field}` must be true or false, got {quoted(row.get(field))}", kind="field"
        )
    _refuse_history(row)
    turns = _turns_of(row)
    prompt = _prompt_of(row) if turns is None else _before_last(turns)
    if not prompt:
        raise DataError("no `prompt` (or `question`)", kind="missing_field")
    name = LAST_TURN if turns is not None else _only_one(row, COMPLETIONS) or COMPLETIONS[0]
    completion = _completion(row, name) if turns is None else turns[-1:]
    media = RowMedia(row, finder)
    messages = _context(prompt, media)
    messages.append(_one_answer(name, completion, media))
    return Judged(with_system(row, with_media(messages, media)), desirable=liked)


def shared_prompt(
    chosen: str | Sequence[Row], rejected: str | Sequence[Row]
) -> tuple[Any, Any, Any]:
    """The prompt that two completions begin with, and what is left of each.

    As `trl.extract_prompt`, which takes transformers and datasets to import.
    """
    same = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        same += 1
    if isinstance(chosen, str) and same and chosen[same - 1] == " ":
        same -= 1  # the space belongs to the answers
    return chosen[:same], chosen[same:], rejected[same:]


LAST_TURN = "messages[-1]"
"""The name of the answer that turns end with."""


def _before_last(turns: Sequence[Row]) -> Sequence[Row]:
    """The turns before the answer. Raises `DataError` if there are none."""
    if len(turns) < 2:
        raise DataError(
            f"`messages` must be a prompt and an answer, got {len(turns)} turn", kind="turns"
        )
    return turns[:-1]


def _turns_of(row: Row) -> Sequence[Row] | None:
    """The role/content turns of `messages` or `conversations`; None if the row has neither.

    Raises `DataError` for a prompt beside them.
    """
    name = next((name for name in ("messages", "conversations") if not is_empty(row.get(name))), "")
    if name:
        _only_one(row, (name, *PROMPTS))
    return [_role_content(turn) for turn in turns_of(row, name)] if name else None


def _role_content(turn: Row) -> Row:
    """A turn with role and content, from one that may have from and value."""
    if "role" in turn or not {"from", "value"} <= turn.keys():
        return turn
    speaker = turn["from"]
    return {**turn, "role": NAMES.get(str(speaker), speaker), "content": turn["value"]}


def _refuse_history(row: Row) -> None:
    """Raises `DataError` for earlier turns in a field that rows of judged answers do not have."""
    if not is_empty(row.get("history")):
        message = "`history` is not read beside judged answers: write its turns into `prompt`"
        raise DataError(message, kind="unsupported")


def _only_one(row: Row, names: Sequence[str]) -> str | None:
    """The one of several names that the row has; None if it has none of them.

    Raises `DataError` if it has two.
    """
    present = [name for name in names if row.get(name) is False or not is_empty(row.get(name))]
    if len(present) > 1:
        raise DataError(f"both `{present[0]}` and `{present[1]}`", kind="field")
    return present[0] if present else None


def _prompt_of(row: Row) -> Any:
    """The row's prompt, with its `input` after a text; None if it has none."""
    name = _only_one(row, PROMPTS)
    whole = None if name is None else row[name]
    if name not in (None, "prompt") and not isinstance(whole, str):
        raise DataError(f"`{name}` must be text, got {quoted(whole)}", kind="field")
    more = None if is_empty(row.get("input")) else row["input"]
    if isinstance(whole, str) and isinstance(more, str):  # as Alpaca's rows have it
        return f"{whole}\n{more}"
    if more is not None:
        raise DataError(f"`input` must be text after a text, got {quoted(more)}", kind="field")
    return whole


def _completion(row: Row, name: str) -> str | Sequence[Row]:
    """The text or the turns of a field; one turn alone is a list of it."""
    completion = row.get(name)
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Mapping) and any(
        isinstance(completion.get(field), str) for field in ("content", "value")
    ):
        return [_role_content(completion)]
    return [_role_content(turn) for turn in turns_of(row, name, "text or list")]


def _context(prompt: str | Sequence[Row], media: RowMedia) -> list[Message]:
    """The turns of a prompt, whose answers carry no loss."""
    if isinstance(prompt, str):
        return [Message("user", text_parts(prompt, "user", media))]
    return messages_of(turns_of({"prompt": prompt}, "prompt", "text or list"), media, context=True)


def _one_answer(name: str, completion: str | Sequence[Row], media: RowMedia) -> Message:
    """The answer of a completion, which is one turn of the assistant's."""
    if isinstance(completion, str):
        answer = Message("assistant", (completion,) if completion else ())
    else:
        turns = messages_of(completion, media)
        if len(turns) != 1 or turns[0].role != "assistant":
            roles = ", ".join(turn.role for turn in turns) or "none"
            raise DataError(
                f"`{name}` must be one turn of the assistant's after the prompt, got: {roles}",
                kind="turns",
            )
        answer = replace(turns[0], trained=True)
    if not is_legible(answer.text):
        raise DataError(f"`{name}` is an empty answer", kind="empty_answer")
    if any(isinstance(part, Media) for part in answer.parts):
        raise DataError(f"`{name}`: an image in an answer", kind="image_count")
    if SURROGATE.search(answer.reasoning + answer.text):
        raise DataError(
            f"`{name}` contains half of a surrogate pair, which is not a character", kind="text"
        )
    return answer


PREFERENCE_FORMS: dict[str, Callable[[Row, MediaFinder], Judged]] = {
    "preference": preference,
    "unpaired_preference": unpaired_preference,
}
