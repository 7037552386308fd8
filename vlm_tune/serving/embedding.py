"""Vectors of a job's texts and images, computed a little at a time between other jobs' steps.

Shapes: E width.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

import numpy as np

from vlm_tune.data.images.patches import stacked
from vlm_tune.data.media_slots import slots_of
from vlm_tune.data.types import Example, Media
from vlm_tune.errors import DataError, ModelError
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.generation.embedding import (
    caption,
    caption_tokens,
    caption_vectors,
    check_image_vectors,
    feature_vectors,
)
from vlm_tune.serving.alone import Events
from vlm_tune.serving.features import Features, JobImages, features_of
from vlm_tune.serving.jobs import Embedded, EmbeddingJob, Listener
from vlm_tune.serving.request import Submitted

TEXTS = 256
"""Texts whose vectors are computed in a step."""
IMAGES = 2
"""Images whose vectors are computed in a step: the answers of others wait for it."""


class EmbeddingRequest(Submitted):
    """A job for vectors that the engine took.

    Attributes:
        job: The job.
        model: The model that computes them.
        captions: The texts, laid out, by their places among the inputs.
        media: The images by theirs.
        images: The decoded images.
    """

    def __init__(
        self,
        job: EmbeddingJob,
        model: VisionLanguageModel,
        listener: Listener,
        computed: Container[bytes],
    ) -> None:
        """Lays out texts and decodes images, in the caller's thread.

        `computed` are the digests of images whose features are there.

        Raises:
            DataError: A text has no token or too many, an image can't be decoded, or the model has
                no vectors of images.
        """
        super().__init__(listener, job.answers)
        self.job = job
        self.model = model
        self.captions: dict[int, Example] = {}
        self.media: dict[int, Media] = {}
        for place, each in enumerate(job.inputs):
            label = f"input {place + 1}"
            if isinstance(each, str):
                self.captions[place] = caption(model, label, each)
            else:
                self.media[place] = model.processor.images.whole(replace(each, label=label))
        if self.media:
            try:
                check_image_vectors(model)
            except ModelError as error:
                raise DataError(str(error), kind="image") from None
        self.images = JobImages(self.media.values(), model, computed)

    @property
    def tokens(self) -> int:
        """The number of tokens of the texts, and of an image for each image."""
        texts = sum(caption_tokens(self.model, each) for each in self.captions.values())
        most = self.model.processor.spec.tokens_per_image
        return texts + sum(slots_of(media, most) for media in self.media.values())


def embedding_events(request: EmbeddingRequest, remembered: Features) -> Events:
    """Yields the one event of a job for vectors, after some steps without.

    `remembered` are features of images that came lately.
    """
    model = request.model
    count = len(request.captions) + len(request.media)
    vectors = np.empty((count, model.llm.width), dtype=np.float32)
    with model.evaluating():
        for places in _chunks(list(request.captions), TEXTS):
            vectors[places] = caption_vectors(model, [request.captions[each] for each in places])
            yield None
        for places in _chunks(list(request.media), IMAGES):
            media = [request.media[place] for place in places]
            features = features_of(model, remembered, [(request.images, each) for each in media])
            joined = stacked([features[each] for each in media], media)
            vectors[places] = feature_vectors(model, joined, media)
            yield None
    yield Embedded(vectors, request.tokens)


def _chunks(places: list[int], size: int) -> list[list[int]]:
    return [places[start : start + size] for start in range(0, len(places), size)]
