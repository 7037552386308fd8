"""Regions between the pixels of original images and the convention of a model.

A model is told, and tells, where things are in the frame that it sees: the whole image as resized,
cropped or padded for the tower. Tiles beside it change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlm_tune.config.boxes import Boxes
from vlm_tune.data.affine import Affine
from vlm_tune.data.media_processor import MediaProcessor
from vlm_tune.data.regions import Region, Size, located, regions_of, write_region
from vlm_tune.data.types import Conversation, Message
from vlm_tune.errors import DataError

ROUNDING = 1e-6
"""Pixels by which rounding may put a point on an edge beyond it."""


@dataclass(frozen=True)
class Grounding:
    """Writes rows' regions for a model, and reads those of its answers.

    Attributes:
        boxes: the model's convention.
        images: how images become the frames that it sees.
    """

    boxes: Boxes
    images: MediaProcessor

    def written(self, conversation: Conversation, moved: Sequence[Affine] = ()) -> Conversation:
        """The row with plain texts in place of its regions, as the model reads and writes them.

        Args:
            conversation: the row.
            moved: how an augmentation moves the places of a frame, move by move.

        Raises:
            DataError: the model sees nothing of a region.
        """
        if not regions_of(conversation):
            return conversation

        def plain(message: Message) -> Message:
            parts = (
                self._text(part, moved) if isinstance(part, Region) else part
                for part in message.parts
            )
            return replace(message, parts=tuple(parts))

        rejected = conversation.rejected
        return replace(
            conversation,
            messages=tuple(map(plain, conversation.messages)),
            rejected=None if rejected is None else plain(rejected),
        )

    def visible(self, region: Region, moved: Sequence[Affine] = ()) -> float:
        """The share of a region that is inside of the frame, from 0 to 1."""
        return self._placed(region, moved)[1]

    def read(self, text: str, size: Size) -> list[Region]:
        """The regions of a model's text, in pixels of the original image of `size`."""
        return [
            self._original(mention.coordinates, size)
            for mention in located(text, self.images.frame(*size), self.boxes)
        ]

    def read_back(self, conversation: Conversation, text: str) -> str:
        """A model's answer to a row, its regions in pixels of the original images.

        An answer to a row whose reference has no region is left as it is. Of several images, each
        region is of that which the reference's region at its place is of.
        """
        sizes = [part.size for part in conversation.messages[-1].parts if isinstance(part, Region)]
        if not sizes:
            return text
        pieces = []
        end = 0
        mentions = {
            size: list(located(text, self.images.frame(*size), self.boxes)) for size in sizes
        }
        for number in range(len(mentions[sizes[0]])):
            size = sizes[min(number, len(sizes) - 1)]
            mention = mentions[size][number]
            pieces += [text[end : mention.start], self._original(mention.coordinates, size)]
            end = mention.end
        return "".join([*pieces, text[end:]])

    def _text(self, region: Region, moved: Sequence[Affine]) -> str:
        placed, visible = self._placed(region, moved)
        if visible <= 0:
            kind = "point" if len(region.coordinates) == 2 else "box"
            width, height = region.size
            raise DataError(
                f"the {kind} {region} of an image of {width}x{height} is outside of what the model "
                "sees: model.tower.resize: pad or squash shows all of it",
                kind="box",
            )
        return write_region(placed, self.images.frame(*region.size), self.boxes)

    def _placed(self, region: Region, moved: Sequence[Affine]) -> tuple[tuple[float, ...], float]:
        """The coordinates of what is in the frame of a region, and its share."""
        coordinates = region.coordinates
        frame = self.images.frame(*region.size)
        share = 1.0
        for affine in (self.images.places(*region.size), *moved):
            mapped = _mapped(affine, coordinates)
            coordinates = _clipped(mapped, frame)
            if len(mapped) == 4:
                share *= _area(coordinates) / _area(mapped) if share > 0 else 0.0
            elif any(abs(a - b) > ROUNDING for a, b in zip(coordinates, mapped, strict=True)):
                share = 0.0
        return coordinates, share

    def _original(self, coordinates: Sequence[float], size: Size) -> Region:
        """A region by its coordinates in the frame, clipped to the original image."""
        numbers = _mapped(self.images.places(*size).inverse(), coordinates)
        return Region(_clipped(numbers, size), size)


def _mapped(affine: Affine, coordinates: Sequence[float]) -> tuple[float, ...]:
    if len(coordinates) == 2:
        return affine.point(coordinates[0], coordinates[1])
    left, top, right, bottom = coordinates
    return affine.box((left, top, right, bottom))


def _clipped(coordinates: Sequence[float], size: Size) -> tuple[float, ...]:
    return tuple(
        min(max(number, 0.0), float(size[place % 2])) for place, number in enumerate(coordinates)
    )


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
