"""The projectors of llama.cpp's mmproj files, in what they differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vlm_tune.config.towers import Tower
from vlm_tune.model.vlm import VisionLanguageConfig, VisionLanguageNetwork

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from vlm_tune.exporting.gguf.mmproj import Mmproj

IMAGE_SLOT = -1
"""Stands for a token of an image in a row's ids."""


@dataclass(frozen=True)
class Projector:
    """A projector of llama.cpp: which models it can hold, how it is written, what it computes.

    Attributes:
        name: its type in the files.
        reasons: gives the reasons why it can't hold a model's tower or connector, from configs.
        token_reasons: gives the reasons why a tokenizer lacks what llama.cpp puts around images.
        notes: gives where llama.cpp's handling of images deviates from how a model was trained.
        vision: gives a tower's transformers config, and its tensors by the names of a CLIP tower.
        describe: adds the metadata that other projectors do not have.
        names: the mmproj names of the connector's layers, by ours.
        connected: computes a connector of the tower's hidden states [M, N, D].
        image_ids: gives the ids of an image, with `IMAGE_SLOT` for its own tokens, from the file's
            tokenizer and metadata of images, the image's width and height, and a frame's tokens.
    """

    name: str
    reasons: Callable[[VisionLanguageConfig], list[str]]
    token_reasons: Callable[[Any], list[str]]
    notes: Callable[[VisionLanguageNetwork], list[str]]
    vision: Callable[[Any], tuple[Any, dict[str, torch.Tensor]]]
    describe: Callable[[GGUFWriter, Any, VisionLanguageNetwork], None]
    names: dict[str, str]
    connected: Callable[[Mmproj, torch.Tensor], torch.Tensor]
    image_ids: Callable[[Any, dict[str, Any], tuple[int, int], int], list[int]]


def cuts_as(config: VisionLanguageConfig, kind: str) -> bool:
    """Whether a model cuts images in this way (`model.tower.split`)."""
    tower = config.model.tower
    return isinstance(tower, Tower) and getattr(tower.split, "kind", None) == kind
