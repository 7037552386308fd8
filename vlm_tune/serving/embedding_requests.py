"""Turns requests for vectors into jobs for the engine, and the vectors into answers."""

from __future__ import annotations

import base64

from vlm_tune.data.types import Media
from vlm_tune.serving.api_errors import ApiError
from vlm_tune.serving.chat_requests import check_media_count, check_texts
from vlm_tune.serving.embedding_wire import (
    Embedding,
    Embeddings,
    EmbeddingsRequest,
    EmbeddingUsage,
)
from vlm_tune.serving.jobs import Embedded, EmbeddingJob
from vlm_tune.serving.limits import Limits
from vlm_tune.serving.media import ReadMedia, labelled_media
from vlm_tune.serving.wire import ImagePart

INPUT = "input"
"""The field of a request that has its texts and images."""


async def embedding_job_of(
    request: EmbeddingsRequest, width: int, limits: Limits, read_media: ReadMedia
) -> EmbeddingJob:
    """The job that answers a request for vectors.

    Args:
        request: The request.
        width: The length of the model's vectors.
        limits: What the server accepts.
        read_media: Reads its images.

    Raises:
        ApiError: The request is beyond the limits, or there is no room for its images.
        DataError: A text is invalid.
    """
    if request.dimensions not in (None, width):
        message = f"dimensions is {width:,}, the length of this model's vectors, or left out"
        raise ApiError(400, message, param="dimensions")
    entries = [request.input] if isinstance(request.input, str) else request.input
    check_media_count(sum(isinstance(each, ImagePart) for each in entries), limits, INPUT)
    texts = {
        place: each if isinstance(each, str) else each.text
        for place, each in enumerate(entries)
        if not isinstance(each, ImagePart)
    }
    check_texts(list(texts.values()), limits, INPUT)
    inputs: list[str | Media] = []
    for place, each in enumerate(entries):
        if isinstance(each, ImagePart):
            label = f"input {place + 1}"
            url = each.image_url.url
            inputs.append(await labelled_media(read_media, url, "image", label, INPUT))
        else:
            inputs.append(texts[place])
    return EmbeddingJob(tuple(inputs), request.model)


def embeddings_of(request: EmbeddingsRequest, embedded: Embedded) -> Embeddings:
    """The answer to a request."""
    encoded = request.encoding_format == "base64"
    return Embeddings(
        data=[
            Embedding(
                index=index,
                embedding=base64.b64encode(vector.astype("<f4").tobytes()).decode()
                if encoded
                else vector.tolist(),
            )
            for index, vector in enumerate(embedded.vectors)
        ],
        model=request.model,
        usage=EmbeddingUsage(prompt_tokens=embedded.tokens, total_tokens=embedded.tokens),
    )
