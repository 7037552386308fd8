"""Images as a native model's own processor prepares them, and the tokens that it gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm_tune.data.affine import Affine
from vlm_tune.data.images.decode import ImageProcessor, decode_image, encoded_bytes, image_size
from vlm_tune.data.types import Media, NativeInputs, Segment
from vlm_tune.errors import DataError
from vlm_tune.quoting import reason_of

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""What a processor returns for the text; all else is of its images."""
SIZES = 100_000
"""Sizes of images whose tokens are remembered."""


class Seen(NamedTuple):
    """An image as a model sees it: its tokens, and width and height of what it is resized to."""

    ids: tuple[int, ...]
    frame: tuple[int, int]


@dataclass(frozen=True)
class NativeImages(ImageProcessor):
    """Prepares images by a processor of transformers.

    The tokens of an image depend on its size alone. What the processor makes of several images is
    what it makes of each, one after the other; `vlm_tune.model.pretrained.native` checks that.

    Attributes:
        processor: transformers' processor of the whole model.
        text: What the chat template writes in an image's place.
        controls: The special tokens among an image's tokens.
    """

    processor: Any = None
    text: str = ""
    controls: tuple[str, ...] = ()  # pyright: ignore[reportIncompatibleMethodOverride]
    _seen: dict[tuple[int, int], Seen] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def layout(self) -> tuple[Any, ...]:
        return self.text, type(self.processor).__name__, self.processor.to_json_string()

    def save(self, folder: Path) -> None:
        self.processor.save_pretrained(folder)

    def segments(self, media: Media, among: int = 1) -> list[Segment]:
        """One segment, with the image's tokens. Raises `DataError` for an unreadable header."""
        return [Segment("media", media, ids=self._of_size(image_size(media), media.name).ids)]

    def frame(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of an image as resized, if the processor gives its grid of patches."""
        return self._of_size((width, height), f"an image of {width}x{height}").frame

    def places(self, width: int, height: int) -> Affine:
        frame_width, frame_height = self.frame(width, height)
        return Affine.scale(frame_width / width, frame_height / height)

    def _of_size(self, size: tuple[int, int], name: str) -> Seen:
        """An image of this size as the model sees it; `name` is the image's in errors."""
        from PIL.Image import new

        seen = self._seen.get(size)
        if seen is None:
            prepared = self._prepared(new("RGB", size), name)
            frame = size
            if "image_grid_thw" in prepared:
                _, rows, columns = prepared["image_grid_thw"][0].tolist()
                patch = self.processor.image_processor.patch_size
                frame = (columns * patch, rows * patch)
            seen = Seen(tuple(prepared["input_ids"][0].tolist()), frame)
            if len(self._seen) < SIZES:
                self._seen[size] = seen
        return seen

    def __call__(self, media: Media) -> torch.Tensor:
        raise NotImplementedError("a native model takes no square pixels, but `inputs`")

    def inputs(self, media: Media) -> NativeInputs:
        """The inputs that the model takes of an image; raises `DataError` if it is damaged."""
        image = decode_image(encoded_bytes(media), media.name)
        prepared = self._prepared(image, media.name)
        return {name: value for name, value in prepared.items() if name not in OF_TEXT}

    def _prepared(self, image: Image, name: str) -> Any:
        try:
            return prepared_images(self.processor, [self.text], [image])
        except (ValueError, ZeroDivisionError) as error:
            raise DataError(
                f"{name}: the model's own image processor refuses it: {reason_of(error)}",
                kind="image_unreadable",
            ) from None


def prepared_images(processor: Any, texts: Sequence[str], images: Sequence[Image]) -> Any:
    """The ids and tensors that a processor of transformers makes of texts with images."""
    return processor(
        text=list(texts),
        images=list(images),
        add_special_tokens=False,
        return_tensors="pt",
    )


def joined_inputs(inputs: Sequence[NativeInputs]) -> NativeInputs:
    """The inputs of several images, in their order, as a forward pass takes them together."""
    import torch

    return {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}
