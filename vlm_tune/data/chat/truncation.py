"""Rows that are longer than `max_length`: left out, split between turns, or shortened in the questions' text.

Image slots and answers are never cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.types import Conversation, Example, Media, Message


def length(example: Example) -> int:
    """What `max_length` bounds: the longer of input and labels."""
    return max(len(example.input_ids), len(example.labels))


@dataclass(frozen=True)
class Fitted:
    """A conversation's examples of at most `max_length` tokens, and those that are too long whatever is done.

    `longest` is the length of its longest example before anything was done.
    """

    examples: list[Example]
    overlong: list[Example]
    longest: int


def fit(
    conversation: Conversation, processor: Processor, how: Literal["fail", "drop", "split", "trim"]
) -> Fitted:
    """A conversation's examples, those over `max_length` left out, split or trimmed as `how` says."""
    limit = processor.spec.max_length
    examples = processor.examples(conversation)
    longest = max(map(length, examples))
    if longest <= limit:
        return Fitted(examples, [], longest)
    if how == "split":
        return Fitted(*_split(conversation, processor), longest)
    if how == "trim":
        # A text cut elsewhere may be tokenised into one more: what is still over is cut again.
        for _ in range(3):
            conversation = _trimmed(conversation, processor, max(map(length, examples)) - limit)
            examples = processor.examples(conversation)
            if all(length(example) <= limit for example in examples):
                break
    return Fitted(
        [e for e in examples if length(e) <= limit],
        [e for e in examples if length(e) > limit],
        longest,
    )


# --- split -----------------------------------------------------------------------------------------------------------


def _split(conversation: Conversation, processor: Processor) -> tuple[list[Example], list[Example]]:
    """As many turns as fit, then a new conversation with the rest: each with the system text and the images so far."""
    limit = processor.spec.max_length
    kept: list[Example] = []
    long: list[Example] = []
    system = tuple(message for message in conversation.messages if message.role == "system")
    pairs = list(_turns(conversation))
    seen: tuple[Media, ...] = ()
    while pairs:
        taken = 1
        found = _examples(conversation, system, seen, pairs[:1], processor)
        while taken < len(pairs):
            more = _examples(conversation, system, seen, pairs[: taken + 1], processor)
            if any(length(example) > limit for example in more):
                break
            taken = taken + 1
            found = more
        piece = len(kept) + len(long)
        for example in found:
            named = replace(example, id=f"{conversation.id}#{piece}" if piece else conversation.id)
            (kept if length(example) <= limit else long).append(named)
            piece += 1
        seen += tuple(
            part
            for pair in pairs[:taken]
            for message in pair
            for part in message.parts
            if isinstance(part, Media)
        )
        pairs = pairs[taken:]
    return kept, long


def _turns(conversation: Conversation) -> Iterator[tuple[Message, ...]]:
    """Each question with its answer."""
    turns = [message for message in conversation.messages if message.role != "system"]
    for start in range(0, len(turns), 2):
        yield tuple(turns[start : start + 2])


def _examples(
    conversation: Conversation,
    system: tuple[Message, ...],
    seen: tuple[Media, ...],
    pairs: list[tuple[Message, ...]],
    processor: Processor,
) -> list[Example]:
    first, *rest = [message for pair in pairs for message in pair]
    first = replace(first, parts=(*seen, *first.parts))
    return processor.examples(replace(conversation, messages=(*system, first, *rest)))


# --- trim ------------------------------------------------------------------------------------------------------------


def _trimmed(conversation: Conversation, processor: Processor, excess: int) -> Conversation:
    """The conversation with `excess` tokens or a few more cut from the ends of its longest questions' texts."""
    messages = list(conversation.messages)
    places = [
        (number, part)
        for number, message in enumerate(messages)
        for part, value in enumerate(message.parts)
        if message.role == "user" and isinstance(value, str)
    ]
    sizes = {
        place: len(processor.encoder.text(str(messages[place[0]].parts[place[1]])))
        for place in places
    }
    while excess > 0 and any(size > 1 for size in sizes.values()):
        place = max(sizes, key=lambda known: sizes[known])
        others = sorted(sizes.values())[-2] if len(sizes) > 1 else 1
        keep = max(min(sizes[place] - 1, max(sizes[place] - excess, others)), 1)
        number, part = place
        text = processor.encoder.first_tokens(str(messages[number].parts[part]), keep)
        excess -= sizes[place] - keep
        sizes[place] = keep
        parts = messages[number].parts
        messages[number] = replace(
            messages[number], parts=(*parts[:part], text, *parts[part + 1 :])
        )
    return replace(conversation, messages=tuple(messages))
