"""Images as a native model's own processor prepares them, and the tokens that it gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    _ids: dict[tuple[int, int], tuple[int, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def described(self) -> tuple[Any, ...]:
        return self.text, type(self.processor).__name__, self.processor.to_json_string()

    def save(self, folder: Path) -> None:
        self.processor.save_pretrained(folder)

    def segments(self, media: Media) -> list[Segment]:
        """One segment, with the image's tokens. Raises `DataError` for an unreadable header."""
        from PIL.Image import new

        size = image_size(media)
        ids = self._ids.get(size)
        if ids is None:
            ids = tuple(self._prepared(new("RGB", size), media.name)["input_ids"][0].tolist())
            if len(self._ids) < SIZES:
                self._ids[size] = ids
        return [Segment("media", media, ids=ids)]

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
