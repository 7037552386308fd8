"""Images as a native model's own processor prepares them, and the tokens that it gives them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm_tune.data.affine import Affine
from vlm_tune.data.images.decode import ImageProcessor, decode_image, encoded_bytes, image_size
from vlm_tune.data.types import Join, Media, NativeInputs, Segment
from vlm_tune.errors import DataError
from vlm_tune.quoting import reason_of

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

TYPES = ("mm_token_type_ids", "token_type_ids")
"""Arguments that tell kinds of tokens apart, by the names of transformers' forward passes."""
OF_TEXT = ("input_ids", "attention_mask", *TYPES)
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

    The tokens of an image depend on its size alone, and with `numbered` on its number in its row.
    What the processor makes of several images is what it makes of each, joined by `joined_inputs`;
    `vlm_tune.model.pretrained.native_images` checks that.

    Attributes:
        processor: transformers' processor of the whole model.
        text: What the chat template writes in an image's place.
        controls: The special tokens among an image's tokens.
        lead: The number of tokens that the processor puts before any text.
        numbered: Whether an image's tokens tell its number in the row.
        joins: How inputs are joined that are not simply put one behind the other.
        token_types: Arguments of the model's forward pass that tell kinds of tokens apart: the type
            of each token id that has another than 0, by the argument's name.
    """

    processor: Any = None
    text: str = ""
    controls: tuple[str, ...] = ()  # pyright: ignore[reportIncompatibleMethodOverride]
    lead: int = 0
    numbered: bool = False
    joins: tuple[Join, ...] = ()
    token_types: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    _seen: dict[tuple[int, int, int], Seen] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def layout(self) -> tuple[Any, ...]:
        return self.text, type(self.processor).__name__, self.processor.to_json_string()

    def save(self, folder: Path) -> None:
        self.processor.save_pretrained(folder)

    def segments(self, media: Media, place: int = 0, among: int = 1) -> list[Segment]:
        """One segment, with the image's tokens. Raises `DataError` for an unreadable header."""
        seen = self._of_size(image_size(media), media.name, place)
        return [Segment("media", media, ids=seen.ids)]

    def frame(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of an image as resized, if the processor gives its grid of patches."""
        return self._of_size((width, height), f"an image of {width}x{height}").frame

    def places(self, width: int, height: int) -> Affine:
        frame_width, frame_height = self.frame(width, height)
        return Affine.scale(frame_width / width, frame_height / height)

    def _of_size(self, size: tuple[int, int], name: str, place: int = 0) -> Seen:
        """An image of this size as the model sees it; `name` is the image's in errors."""
        from PIL.Image import new

        key = (*size, place if self.numbered else 0)
        seen = self._seen.get(key)
        if seen is None:
            image = new("RGB", size)
            prepared = self._prepared([image], name)
            ids = prepared["input_ids"][0].tolist()[self.lead :]
            if key[-1]:
                before = self._prepared([image] * place, name)["input_ids"][0]
                together = self._prepared([image] * (place + 1), name)["input_ids"][0]
                ids = together[len(before) :].tolist()
            frame = size
            if "image_grid_thw" in prepared:
                _, rows, columns = prepared["image_grid_thw"][0].tolist()
                patch = self.processor.image_processor.patch_size
                frame = (columns * patch, rows * patch)
            seen = Seen(tuple(ids), frame)
            if len(self._seen) < SIZES:
                self._seen[key] = seen
        return seen

    def __call__(self, media: Media) -> torch.Tensor:
        raise NotImplementedError("a native model takes no square pixels, but `inputs`")

    def inputs(self, media: Media) -> NativeInputs:
        """The inputs that the model takes of an image; raises `DataError` if it is damaged."""
        image = decode_image(encoded_bytes(media), media.name)
        return of_images(self._prepared([image], media.name))

    def _prepared(self, images: Sequence[Image], name: str) -> Any:
        """All that the processor returns for images in one text."""
        try:
            return prepared_images(self.processor, [self.text * len(images)], images)
        except (ValueError, ZeroDivisionError) as error:
            raise DataError(
                f"{name}: the model's own image processor refuses it: {reason_of(error)}",
                kind="image_unreadable",
            ) from None


def prepared_images(
    processor: Any, texts: Sequence[str], images: Sequence[Image | Sequence[Image]]
) -> Any:
    """The ids and tensors that a processor of transformers makes of texts with images."""
    return processor(
        text=list(texts),
        images=list(images),
        add_special_tokens=False,
        return_tensors="pt",
    )


def of_images(prepared: Any) -> NativeInputs:
    """The inputs of images among all that a processor returns."""
    return {name: value for name, value in prepared.items() if name not in OF_TEXT}


def joined_inputs(inputs: Sequence[NativeInputs], joins: Sequence[Join] = ()) -> NativeInputs:
    """The inputs of several images, in their order, as a forward pass takes them together.

    They are joined along the first dimension unless `joins` says otherwise; where they differ in
    other dimensions, with zeros behind.
    """
    rules = {join.name: join for join in joins}
    return {name: _joined(inputs, rules.get(name, Join(name))) for name in inputs[0]}


def _joined(inputs: Sequence[NativeInputs], join: Join) -> torch.Tensor:
    import torch
    from torch.nn.functional import pad

    tensors = [one[join.name] for one in inputs]
    if join.counted:
        tensors = _counted_on(tensors, [one[join.counted] for one in inputs], join)
    most = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        room = [
            0 if place == join.dimension else size - tensor.shape[place]
            for place, size in enumerate(most)
        ]
        return pad(tensor, [each for size in reversed(room) for each in (0, size)])

    return torch.cat([padded(tensor) for tensor in tensors], join.dimension)


def _counted_on(
    tensors: Sequence[torch.Tensor], counted: Sequence[torch.Tensor], join: Join
) -> list[torch.Tensor]:
    """Places in each image's part of an input, as places in the whole; negative ones are none."""
    moved = []
    before = 0
    for tensor, whole in zip(tensors, counted, strict=True):
        moved.append(tensor + before * (tensor >= 0).to(tensor.dtype))
        before += math.prod(whole.shape[: join.counted_dimensions])
    return moved
