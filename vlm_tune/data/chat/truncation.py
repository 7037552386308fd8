"""Handles rows longer than `max_length`: drops them, splits them at turns or shortens questions.

Image slots and answers are never cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.regions import Region
from vlm_tune.data.types import Conversation, Example, Media, Message


def length(example: Example) -> int:
    """The length that `max_length` bounds: the longer of input and labels, in tokens."""
    return max(len(example.input_ids), len(example.labels))


@dataclass(frozen=True)
class Fitted:
    """A conversation's examples of at most `max_length` tokens, and those that remain too long.

    `longest` is the length of its longest example before any change.
    """

    examples: list[Example]
    overlong: list[Example]
    longest: int


def fit(
    conversation: Conversation, processor: Processor, how: Literal["fail", "drop", "split", "trim"]
) -> Fitted:
    """Makes a conversation's examples; handles those over `max_length` according to `how`."""
    limit = processor.spec.max_length
    examples = processor.examples(conversation)
    longest = max(map(length, examples))
    if longest <= limit:
        return Fitted(examples, [], longest)
    judged = conversation.rejected is not None or conversation.desirable is not None
    if how == "split" and not judged:  # earlier turns of a row of preferences train nothing
        return Fitted(*_split(conversation, processor), longest)
    if how == "trim":
        # A shortened text may be tokenised into one more token, so what is still over is cut again.
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


# --- split ---


def _split(conversation: Conversation, processor: Processor) -> tuple[list[Example], list[Example]]:
    """Splits a conversation into parts of as many turns as fit.

    Each part begins with the system text and the images of the parts before. Returns the examples
    that fit and those that are too long.
    """
    limit = processor.spec.max_length
    fitting: list[Example] = []
    long: list[Example] = []
    system = tuple(message for message in conversation.messages if message.role == "system")
    pairs = list(_turns(conversation))
    seen: tuple[Media, ...] = ()
    while pairs:
        taken = 1
        examples = _examples(conversation, system, seen, pairs[:1], processor)
        while taken < len(pairs):
            more = _examples(conversation, system, seen, pairs[: taken + 1], processor)
            if any(length(example) > limit for example in more):
                break
            taken = taken + 1
            examples = more
        piece = len(fitting) + len(long)
        for example in examples:
            named = replace(example, id=f"{conversation.id}#{piece}" if piece else conversation.id)
            (fitting if length(example) <= limit else long).append(named)
            piece += 1
        seen += tuple(
            part
            for pair in pairs[:taken]
            for message in pair
            for part in message.parts
            if isinstance(part, Media)
        )
        pairs = pairs[taken:]
    return fitting, long


def _turns(conversation: Conversation) -> Iterator[tuple[Message, ...]]:
    """Yields each question with its answer."""
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


# --- trim ---


def _trimmed(conversation: Conversation, processor: Processor, excess: int) -> Conversation:
    """The conversation with its longest questions' texts cut at their ends.

    `excess` tokens or a few more are removed.
    """
    messages = list(conversation.messages)
    places = [
        (number, part)
        for number, message in enumerate(messages)
        for part, value in enumerate(message.parts)
        # A box that is cut would be another.
        if message.role == "user" and isinstance(value, str) and not isinstance(value, Region)
    ]
    sizes = {
        place: len(processor.encoder.text(str(messages[place[0]].parts[place[1]])))
        for place in places
    }
    while excess > 0 and any(size > 1 for size in sizes.values()):
        place = max(sizes, key=lambda candidate: sizes[candidate])
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
