"""Turns requests of the API into jobs for the engine."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from vlm_tune.data.types import Conversation, Media, Message, Modality
from vlm_tune.generation.choices import check_not_generated, choices_of_each
from vlm_tune.generation.requests import check_text
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.serving.api_errors import ApiError
from vlm_tune.serving.jobs import Job
from vlm_tune.serving.limits import MOST_SCHEMA, Limits
from vlm_tune.serving.media import ReadMedia, labelled_media
from vlm_tune.serving.wire import (
    AudioPart,
    ChatMessage,
    ChatRequest,
    ImagePart,
    JsonObjectFormat,
    JsonSchemaFormat,
    TextPart,
)

MESSAGES = "messages"
"""The field of a request that has its texts and images."""


async def job_of(request: ChatRequest, name: str, limits: Limits, read_media: ReadMedia) -> Job:
    """The job that answers a request.

    Args:
        request: The request.
        name: The name of the request, for messages.
        limits: What the server accepts.
        read_media: Reads its images and audio clips.

    Raises:
        ApiError: The request is beyond the limits, or there is no room for its images.
        VlmTuneError: An image can't be read, or a setting is out of range.
    """
    # Cheap checks first: nothing is read for a request that is refused anyway.
    decoding = decoding_of(request, limits)
    parts = [part for message in request.messages for part in _media_parts(message)]
    clips = sum(isinstance(part, AudioPart) for part in parts)
    check_media_count(len(parts) - clips, limits, MESSAGES, clips=clips)
    texts = [text for message in request.messages for text in _texts(message)]
    check_texts([*texts, *(request.choices or ())], limits, MESSAGES)
    if request.messages[-1].role != "user":
        raise ApiError(400, "the last message is the user's", param=MESSAGES)
    counts: Counter[Modality] = Counter()

    async def media(part: ImagePart | AudioPart) -> Media:
        modality: Modality = "image" if isinstance(part, ImagePart) else "audio"
        counts[modality] += 1
        label = f"{modality} {counts[modality]}"
        url = part.image_url.url if isinstance(part, ImagePart) else _audio_url(part)
        return await labelled_media(read_media, url, modality, label, MESSAGES)

    messages = [await _message(message, media) for message in request.messages]
    conversation = Conversation(name, tuple(messages))
    return Job(conversation, decoding, request.model, tuple(request.choices or ()))


def decoding_of(request: ChatRequest, limits: Limits) -> Decoding:
    """How the answers to a request are generated.

    Settings of draws have no effect at temperature 0, as in OpenAI's API.

    Raises:
        ApiError: Too many tokens are asked for.
        ArgumentError: Settings do not fit each other.
    """
    tokens = request.max_completion_tokens or request.max_tokens
    if tokens is not None and tokens > limits.max_tokens:
        name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        message = f"{name} is at most {limits.max_tokens:,} on this server, got {tokens:,}"
        raise ApiError(400, message, param=name)
    settings: dict[str, Any] = {
        "max_new_tokens": tokens,
        "num_beams": request.num_beams,
        "repetition_penalty": request.repetition_penalty,
        "num_return_sequences": request.n,
        "stop_strings": request.stop,
        "logprobs": request.logprobs,
        "top_logprobs": request.top_logprobs,
        "json_schema": _json_schema(request),
        "enable_thinking": _thinking(request),
    }
    temperature = _temperature(request)
    if temperature > 0:
        settings |= {
            "temperature": temperature,
            "top_p": request.top_p,
            "top_k": None if request.top_k is None else max(request.top_k, 0),
            "min_p": request.min_p,
            "seed": None if request.seed is None else request.seed % 2**63,
        }
    decoding = Decoding.of({name: each for name, each in settings.items() if each is not None})
    if request.choices is None:
        return decoding
    choices_of_each(request.choices, 1)
    idle = {"max_new_tokens"} | ({"temperature"} if request.temperature is None else set())
    check_not_generated(name for name in decoding.given if name not in idle)
    return Decoding()


def _json_schema(request: ChatRequest) -> dict[str, Any] | None:
    """The schema that the answer follows, if any. Raises `ApiError` for one too large."""
    match request.response_format:
        case JsonObjectFormat():
            return {"type": "object"}
        case JsonSchemaFormat(json_schema=named):
            try:
                characters = len(json.dumps(named.json_schema))
            except RecursionError:
                message = "the schema of response_format is too deep"
                raise ApiError(400, message, param="response_format") from None
            if characters > MOST_SCHEMA:
                message = (
                    f"the schema of response_format has {characters:,} characters, "
                    f"more than {MOST_SCHEMA:,}"
                )
                raise ApiError(400, message, param="response_format")
            return named.json_schema
    return None


def _thinking(request: ChatRequest) -> bool | None:
    """Whether the model reasons before its answer; None for its own mode."""
    arguments = request.chat_template_kwargs
    if arguments is not None and arguments.enable_thinking is not None:
        return arguments.enable_thinking
    return None if request.reasoning_effort is None else False


def _temperature(request: ChatRequest) -> float:
    if request.temperature is not None:
        return request.temperature
    several = (request.n or 1) > 1 and (request.num_beams or 1) == 1
    draws = several or (request.top_p or 1) < 1 or (request.top_k or 0) > 0 or request.min_p
    return 1.0 if draws else 0.0


def check_media_count(images: int, limits: Limits, param: str, *, clips: int = 0) -> None:
    """Raises `ApiError` for more images and clips of audio than a request may have.

    `param` is the name of their field.
    """
    if images + clips > limits.max_images:
        counts = {"images": images, "audio clips": clips}
        received = " and ".join(f"{count:,} {noun}" for noun, count in counts.items() if count)
        raise ApiError(
            400,
            f"a request has at most {limits.max_images:,} images or audio clips on this server, "
            f"got {received}",
            param=param,
            code="too_many_audio_clips" if clips > images else "too_many_images",
        )


def check_texts(texts: Sequence[str], limits: Limits, param: str) -> None:
    """Checks all texts of a request; `param` is the name of their field.

    Raises:
        ApiError: They are too long together.
        ArgumentError: One has characters that no text has.
    """
    characters = sum(map(len, texts))
    if characters > limits.text_characters:
        raise ApiError(
            400,
            f"the texts have {characters:,} characters, more than {limits.text_characters:,}",
            param=param,
            code="context_length_exceeded",
        )
    for text in texts:
        check_text("a text", text)


def _audio_url(part: AudioPart) -> str:
    return f"data:audio;base64,{part.input_audio.data}"


def _media_parts(message: ChatMessage) -> list[ImagePart | AudioPart]:
    content = message.content if isinstance(message.content, list) else []
    return [part for part in content if isinstance(part, ImagePart | AudioPart)]


def _texts(message: ChatMessage) -> list[str]:
    content = message.content
    reasoning = message.reasoning_content if message.role == "assistant" else None
    texts = [reasoning] if reasoning else []
    if isinstance(content, str):
        return [*texts, content]
    return [*texts, *(part.text for part in content or () if isinstance(part, TextPart))]


async def _message(
    message: ChatMessage, read: Callable[[ImagePart | AudioPart], Awaitable[Media]]
) -> Message:
    """A turn. Texts have no marks of images: `<image>` in one is plain text."""
    content = message.content
    parts: list[str | Media] = []
    for part in [content] if isinstance(content, str) else content or ():
        if isinstance(part, ImagePart | AudioPart):
            parts.append(await read(part))
        else:
            text = part if isinstance(part, str) else part.text
            parts += [text] if text else []
    role = "system" if message.role == "developer" else message.role
    reasoning = message.reasoning_content if message.role == "assistant" else None
    return Message(role, tuple(parts), reasoning=reasoning or "")
