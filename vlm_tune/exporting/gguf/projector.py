"""The projectors of llama.cpp's mmproj files, in what they differ.

Shapes: T tokens of an image, E width of the LLM, L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.types import Example, Media
from vlm_tune.model.vlm import VisionLanguageConfig, VisionLanguageNetwork
from vlm_tune.quoting import applying, name_list

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from vlm_tune.exporting.gguf.mmproj_reading import Mmproj

IMAGE_SLOT = -1
"""Stands for a token of an image in a row's ids."""
VISION = "vision_tower.vision_model."
"""What the package gguf has in front of the tensors of a CLIP tower."""


@dataclass(frozen=True)
class Projector:
    """A projector of llama.cpp: which models it can hold, how it is written, what it computes.

    Attributes:
        name: its type in the files.
        reasons: gives the reasons why it can't hold a model's tower or connector, from the model's
            config and transformers' config of its LLM (None for an encoder-decoder).
        markers: the texts that llama.cpp puts around images, each of which must be one token.
        notes: gives where llama.cpp's handling of images deviates from how a model was trained.
        vision: gives a tower's transformers config, and its tensors by names that the package gguf
            knows.
        describe: adds the metadata that other projectors do not have.
        connector: gives the tensors of a model's connector, by their names in an mmproj file, for
            a precision of the language model's file.
        features: computes an image's tokens [T, E] of its pixels uint8[3, H, W].
        image_ids: gives the ids of an image, with `IMAGE_SLOT` for its own tokens, from the file's
            tokenizer and metadata of images, the image, and the model's processor.
        around: text of the chat format before and after an image.
        both_ways: whether llama.cpp lets the tokens of an image see each other both ways.
        row_end: the control token between the rows of an image's tokens, whose embedding the
            mmproj file has.
        norm_eps: what llama.cpp's norm in the connector adds; None for what the tower's norms add.
    """

    name: str
    reasons: Callable[[VisionLanguageConfig, Any], list[str]]
    markers: tuple[str, ...]
    notes: Callable[[VisionLanguageNetwork], list[str]]
    vision: Callable[[Any], tuple[Any, dict[str, torch.Tensor]]]
    describe: Callable[[GGUFWriter, Any, VisionLanguageNetwork], None]
    connector: Callable[[VisionLanguageNetwork, str], dict[str, torch.Tensor]]
    features: Callable[[Mmproj, torch.Tensor], torch.Tensor]
    image_ids: Callable[[Any, dict[str, Any], Media, Processor], list[int]]
    around: str = ""
    both_ways: bool = False
    row_end: str | None = None
    norm_eps: float | None = None

    def token_reasons(self, tokenizer: Any) -> list[str]:
        """The reasons why a tokenizer lacks what llama.cpp puts around images."""
        missing = [
            repr(marker)
            for marker in self.markers
            if len(tokenizer.encode(marker, add_special_tokens=False)) != 1
        ]
        return applying(
            (
                missing,
                f"its tokenizer has no single token for {name_list(missing)}, which llama.cpp puts "
                "around images",
            )
        )

    def image_places(self, example: Example, processor: Processor) -> torch.Tensor:
        """Which tokens of an example llama.cpp takes from the mmproj file, bool[L]."""
        shown = torch.from_numpy(example.image_mask)
        if self.row_end is None:
            return shown
        ends = processor.encoder.control(self.row_end)
        return shown | (torch.from_numpy(example.input_ids) == ends)


def clip_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A CLIP tower's tensors by the names that the package gguf knows."""
    return {f"{VISION}{key}": tensor for key, tensor in state.items()}


def connector_tensors(connector: torch.nn.Module, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """A connector's tensors by their names in an mmproj file; `names` has those of its layers."""
    tensors = {}
    for key, tensor in connector.state_dict().items():
        owner, _, kind = key.rpartition(".")
        tensors[f"{names[owner]}.{kind}"] = tensor
    return tensors


def square_ids(
    markers: tuple[str, str],
) -> Callable[[Any, dict[str, Any], Media, Processor], list[int]]:
    """The `image_ids` of a projector whose images are squares of tokens between two markers."""

    def image_ids(
        tokenizer: Any, vision: dict[str, Any], media: Media, processor: Processor
    ) -> list[int]:
        begin, end = (tokenizer.encode(marker, add_special_tokens=False) for marker in markers)
        side = vision["image_size"] // vision["patch_size"] // vision["projector.scale_factor"]
        return [*begin, *[IMAGE_SLOT] * side**2, *end]

    return image_ids
