"""Boxes and points in texts: as parts of a row, as a model writes them, and read back.

Places are in pixels and continuous: (0, 0) is an image's upper left corner, (width, height) its
lower right one. A box has four coordinates, x1, y1, x2, y2; a point two, x and y.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_tune.config.boxes import Boxes
from vlm_tune.data.types import Conversation, Message

Size = tuple[int, int]
"""Width and height."""

BINS = 1024
"""Places along a side that PaliGemma has tokens for: <loc0000> to <loc1023>."""
FIRST_LOCATION = "<loc0000>"


class Region(str):
    """A box or a point that stands in a turn's text.

    The text itself has it in pixels of the original image, for people and for scores. What a model
    reads and writes is in its own convention; see `vlm_tune.data.chat.grounding`.

    Attributes:
        coordinates: in pixels of the upright image.
        size: the image's width and height.
    """

    coordinates: tuple[float, ...]
    size: Size

    def __new__(cls, coordinates: Sequence[float], size: Size) -> Region:
        """The region of an image of `size`."""
        region = super().__new__(cls, pixel_text(coordinates))
        region.coordinates = tuple(coordinates)
        region.size = size
        return region

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self.coordinates, self.size


def pixel_text(coordinates: Sequence[float]) -> str:
    """Coordinates in brackets, rounded to tenths of a pixel: `[12, 30.5, 64, 80]`."""
    return f"[{', '.join(f'{round(number, 1):.10g}' for number in coordinates)}]"


def regions_of(conversation: Conversation) -> list[Region]:
    """All regions of a row in reading order, those of a rejected answer last."""
    rejected = conversation.rejected
    messages = conversation.messages if rejected is None else (*conversation.messages, rejected)
    return [part for message in messages for part in message.parts if isinstance(part, Region)]


def region_size(message: Message) -> Size | None:
    """The size of the image that a turn's first region is of; None if it has no region."""
    return next((part.size for part in message.parts if isinstance(part, Region)), None)


# --- a model's convention -------------------------------------------------------------------------


def write_region(coordinates: Sequence[float], frame: Size, boxes: Boxes) -> str:
    """Coordinates in pixels of a frame, which the model sees, in the model's convention.

    A box that is thinner than a step of the convention is written one step wide: an empty one would
    be read back as nothing.
    """
    sides = [frame[number % 2] for number in range(len(coordinates))]
    shares = [
        min(max(number / side, 0.0), 1.0) for number, side in zip(coordinates, sides, strict=True)
    ]
    numbers = _numbers(shares, sides, boxes)
    if len(numbers) == 4:
        for axis in (0, 1):
            if numbers[axis] == numbers[axis + 2]:
                centre = (shares[axis] + shares[axis + 2]) / 2
                shares[axis::2] = _one_step(centre, sides[axis], boxes)
        numbers = _numbers(shares, sides, boxes)
    if boxes.unit == "loc":
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        return "".join(f"<loc{y}><loc{x}>" for x, y in pairs)
    if boxes.style == "parentheses":
        return ",".join(f"({x},{y})" for x, y in zip(numbers[::2], numbers[1::2], strict=True))
    return f"[{', '.join(numbers)}]"


def _numbers(shares: Sequence[float], sides: Sequence[int], boxes: Boxes) -> list[str]:
    """Shares of a frame's sides as numbers of a convention."""
    match boxes.unit:
        case "pixels":
            return [str(round(share * side)) for share, side in zip(shares, sides, strict=True)]
        case "norm1000":
            return [str(round(1000 * share)) for share in shares]
        case "norm1":
            return [f"{share:.{boxes.decimals}f}" for share in shares]
        case "loc":
            return [f"{min(int(share * BINS), BINS - 1):04}" for share in shares]


def _one_step(centre: float, side: int, boxes: Boxes) -> list[float]:
    """The step of a convention that a share of a frame's side is in, from its begin to its end."""
    steps = {"pixels": side, "norm1000": 1000, "norm1": 10**boxes.decimals, "loc": BINS}[boxes.unit]
    last = steps - 2 if boxes.unit == "loc" else steps - 1
    first = min(math.floor(centre * steps), last)
    return [first / steps, (first + 1) / steps]


NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
PAIR = f"{NUMBER},{NUMBER}"
WRITTEN = re.compile(
    rf"[\[(]{PAIR},{PAIR}[\])]"  # [x1, y1, x2, y2]
    rf"|\({PAIR}\)\s*,?\s*\({PAIR}\)"  # (x1,y1),(x2,y2)
    rf"|[\[(]{PAIR}[\])]"  # [x, y]
)
"""A box or a point in numbers."""
LOCATION = r"<loc(\d{4})>"
LOCATIONS = re.compile(f"{LOCATION * 4}|{LOCATION * 2}")
"""A box or a point in PaliGemma's tokens, y before x."""


@dataclass(frozen=True)
class Mention:
    """A region in a text, from `start` to `end`, with its coordinates as they were read."""

    start: int
    end: int
    coordinates: tuple[float, ...]


def mentions(text: str) -> Iterator[Mention]:
    """The boxes and points that a text has in numbers, in brackets or parentheses.

    A box's corners are put in order.
    """
    for match in WRITTEN.finditer(text):
        numbers = tuple(float(number) for number in match.groups() if number is not None)
        yield Mention(match.start(), match.end(), ordered(numbers))


def locations(text: str) -> Iterator[Mention]:
    """The boxes and points that a text has in PaliGemma's tokens, as x and y of their bins."""
    for match in LOCATIONS.finditer(text):
        bins = [float(number) for number in match.groups() if number is not None]
        places = zip(bins[1::2], bins[::2], strict=True)
        numbers = tuple(number for place in places for number in place)
        yield Mention(match.start(), match.end(), ordered(numbers))


def located(text: str, frame: Size, boxes: Boxes) -> Iterator[Mention]:
    """The regions that a model wrote in its convention, in pixels of the frame that it saw."""
    if boxes.unit != "loc":
        scales = {
            "pixels": (1.0, 1.0),
            "norm1": frame,
            "norm1000": (frame[0] / 1e3, frame[1] / 1e3),
        }
        across, down = scales[boxes.unit]
        for mention in mentions(text):
            scaled = tuple(
                number * (down if place % 2 else across)
                for place, number in enumerate(mention.coordinates)
            )
            yield Mention(mention.start, mention.end, scaled)
        return
    for mention in locations(text):
        # The middle of a bin.
        scaled = tuple(
            (number + 0.5) / BINS * frame[place % 2]
            for place, number in enumerate(mention.coordinates)
        )
        yield Mention(mention.start, mention.end, scaled)


def ordered(coordinates: tuple[float, ...]) -> tuple[float, ...]:
    """Coordinates with a box's smaller ones first."""
    if len(coordinates) == 2:
        return coordinates
    x1, y1, x2, y2 = coordinates
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
