"""Vectors of images and texts that can be compared: those that a contrastive objective trains.

Shapes: I images, T texts, E width of the LLM's embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vlm_tune.data.batching.collate import collate
from vlm_tune.data.images.patches import patch_places, stacked, token_counts
from vlm_tune.data.types import Conversation, Example, Media, Message
from vlm_tune.errors import ArgumentError, DataError, ModelError
from vlm_tune.generation.requests import check_text, image_media
from vlm_tune.model.connectors.layers import matched
from vlm_tune.model.language.decoding import check_count
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.quoting import quoted


def listed_images(images: Any) -> list[Media]:
    """The media items of a list of images in any of the supported forms, with their numbers.

    Raises:
        ArgumentError: It is no list, or an empty one.
        DataError: An image has another form, or is not there; the message has its number.
    """
    media: list[Media] = []
    for number, image in enumerate(_listed("images", images), 1):
        label = f"image {number}"
        try:
            media.append(replace(image_media(image), label=label))
        except DataError as error:
            raise DataError(f"{label}: {error.message}", kind=error.kind) from None
    return media


def listed_texts(texts: Any) -> list[str]:
    """The texts of a list.

    Raises:
        ArgumentError: It is no list, or an empty one, or has an entry that is no text.
    """
    listed = _listed("texts", texts)
    for number, text in enumerate(listed, 1):
        check_text(f"text {number}", text)
    return listed


def _listed(name: str, given: Any) -> list[Any]:
    if (
        isinstance(given, str | bytes)
        or not isinstance(given, Iterable)
        or not (listed := list(given))
    ):
        raise ArgumentError(f"{name}: expected a list with at least one entry, got {quoted(given)}")
    return listed


def image_embeddings(
    model: VisionLanguageNetwork, images: Sequence[Media], batch_size: int
) -> np.ndarray:
    """Unit vectors fp32[I, E] of images: the means of the connector's outputs.

    An image that is cut in tiles counts as a whole.

    Raises:
        ArgumentError: `batch_size` is not a positive integer.
        DataError: An image can't be decoded.
        ModelError: The connector reads the question, or it is a native model or one that hears.
    """
    check_count("batch_size", batch_size)
    check_image_vectors(model)
    vectors: list[np.ndarray] = []
    for start in range(0, len(images), batch_size):
        shown = [model.processor.images.whole(each) for each in images[start : start + batch_size]]
        pixels = stacked([model.processor.images(media) for media in shown], shown)
        places = patch_places(shown)
        shapes = () if places is None else (places.to(model.device),)
        with torch.inference_mode():
            features = model.tower(pixels.to(model.device), *shapes)
        vectors.append(feature_vectors(model, features, shown))
    return np.concatenate(vectors)


def check_image_vectors(model: VisionLanguageNetwork) -> None:
    """Raises `ModelError` if an image alone has no vector in the model."""
    if model.processor.images.modality != "image":
        raise ModelError(
            "an image alone has no vector here: the model's tower takes audio (model.tower.kind), "
            "of which none are computed"
        )
    if model.llm.native:
        raise ModelError(
            "an image alone has no vector here: a native model's own forward pass has none to show"
        )
    if model.connector.needs_text:
        raise ModelError(
            "an image alone has no vector here: the model's connector reads the question with it"
        )


@torch.inference_mode()
def feature_vectors(
    model: VisionLanguageNetwork, features: torch.Tensor, images: Sequence[Media]
) -> np.ndarray:
    """Unit vectors fp32[I, E] of whole images, by the tower's features [I, N, D]."""
    connected = model.connector(matched(features, model.connector))
    counts = token_counts(images)
    counts = None if counts is None else counts.to(connected.device)
    return model.image_vectors(connected, counts).cpu().numpy()


def text_embeddings(
    model: VisionLanguageNetwork, texts: Sequence[str], batch_size: int
) -> np.ndarray:
    """Unit vectors fp32[T, E] of texts, each as a caption: the sums of their tokens' embeddings.

    Raises:
        ArgumentError: `batch_size` is not a positive integer.
        DataError: A text has no token, or more than the model's rows.
    """
    check_count("batch_size", batch_size)
    captions = [caption(model, f"text {number}", text) for number, text in enumerate(texts, 1)]
    vectors = [
        caption_vectors(model, captions[start : start + batch_size])
        for start in range(0, len(captions), batch_size)
    ]
    return np.concatenate(vectors)


def caption(model: VisionLanguageNetwork, name: str, text: str) -> Example:
    """The example of a text as an answer, whose labels are its tokens.

    Raises `DataError`, with the text's name, if it has no token or more than the model's rows.
    """
    row = Conversation(name, (Message("user", ("",)), Message("assistant", (text,))))
    (example,) = model.processor.examples(row)
    if not caption_tokens(model, example):
        raise DataError(f"{name}: {quoted(text)} has no token, and so no vector", kind="text")
    model.processor.check_lengths([example])
    return example


def caption_tokens(model: VisionLanguageNetwork, example: Example) -> int:
    """The number of a caption's tokens, without those that end an answer."""
    ends = model.processor.stop_ids
    return sum(token >= 0 and token not in ends for token in example.labels.tolist())


@torch.inference_mode()
def caption_vectors(model: VisionLanguageNetwork, captions: Sequence[Example]) -> np.ndarray:
    """Unit vectors fp32[T, E] of captions, which are batched together."""
    batch = collate(captions, model.processor.spec)
    return model.caption_vectors(batch.labels.to(model.device)).cpu().numpy()
