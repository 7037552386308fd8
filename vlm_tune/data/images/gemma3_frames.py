"""Gemma 3's images in a prompt: one frame between markers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm_tune.data.types import Media, Segment, Tile

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Gemma3Frames:
    """The whole image, squashed, between empty lines and markers.

    As transformers' Gemma 3 processor has it without pan and scan (`processing_gemma3.py`).
    """

    begin = "<start_of_image>"
    end = "<end_of_image>"
    around = "\n\n"

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.begin, self.end)

    def most(self, side: int) -> int:
        return 1

    def segments(
        self, media: Media, size: tuple[int, int], side: int, among: int = 1
    ) -> list[Segment]:
        return [
            Segment("text", self.around),
            Segment("control", self.begin),
            Segment("media", media),
            Segment("control", self.end),
            Segment("text", self.around),
        ]

    def frames(self, image: Image, side: int) -> Mapping[Tile | None, Image]:
        from PIL.Image import Resampling

        return {None: image.resize((side, side), Resampling.BILINEAR)}
