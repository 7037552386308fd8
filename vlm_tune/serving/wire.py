"""Requests and answers of the HTTP API as they stand in JSON; OpenAI's, with further fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from vlm_tune.serving.idle_fields import changes_nothing
from vlm_tune.serving.limits import (
    LONGEST_STOP,
    MOST_ANSWERS,
    MOST_CHOICES,
    MOST_FIELDS,
    MOST_MESSAGES,
    MOST_STOPS,
    MOST_TOP,
)

MANY_FIELDS = "many_fields"
"""pydantic's type of the error of an object with too many fields."""


class Strict(BaseModel):
    """A part of a request: of the stated types, without other fields."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _of_few_fields(cls, fields: Any) -> Any:
        """Refuses objects of very many fields: each unknown one would be an error to list."""
        if isinstance(fields, Mapping) and len(fields) > MOST_FIELDS:
            raise PydanticCustomError(MANY_FIELDS, "too many fields")
        return fields


def _form(content: Any) -> str:
    return "parts" if isinstance(content, list) else "text"


class TextPart(Strict):
    """A text within a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """The place of an image."""

    url: Annotated[
        str,
        Field(
            description="A data URL (data:image/png;base64,...). An http(s) URL where the server "
            "allows the host, a path where it has an image folder.",
            examples=["data:image/png;base64,iVBORw0KGgo..."],
        ),
    ]
    detail: Annotated[
        Literal["auto", "low", "high"] | None,
        Field(description="Has no effect: an image is read as in training."),
    ] = None


class ImagePart(Strict):
    """An image within a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(Strict):
    """An audio clip."""

    data: Annotated[str, Field(description="The encoded file, in base64.", min_length=1)]
    format: Annotated[
        Literal["wav", "mp3", "flac", "ogg"] | None,
        Field(description="Has no effect: the file's first bytes tell it."),
    ] = None


class AudioPart(Strict):
    """An audio clip within a message."""

    type: Literal["input_audio"]
    input_audio: InputAudio


Text = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[TextPart], Tag("parts"), Field(max_length=1000, fail_fast=True)],
    Discriminator(_form),
]
Part = Annotated[TextPart | ImagePart | AudioPart, Discriminator("type")]
Content = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[Part], Tag("parts"), Field(max_length=1000, fail_fast=True)],
    Discriminator(_form),
]


StopText = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Stop = Annotated[
    Annotated[StopText, Tag("text")]
    | Annotated[list[StopText], Tag("parts"), Field(max_length=MOST_STOPS)],
    Discriminator(_form),
]


class SystemMessage(Strict):
    """The system text, in place of the model's; the first message."""

    role: Literal["system", "developer"]
    content: Text
    name: str | None = None


class UserMessage(Strict):
    """A question with its images or audio clips, in reading order."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Strict):
    """An earlier answer. A message of a completion can be sent back as it is."""

    role: Literal["assistant"]
    content: Text | None = None
    name: str | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    reasoning_content: Annotated[
        str | None,
        Field(description="The reasoning before it, for models that read that of earlier answers."),
    ] = None


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage, Discriminator("role")]


class StreamOptions(Strict):
    """Further settings of a stream."""

    include_usage: Annotated[
        bool, Field(description="Whether a last chunk has the numbers of tokens.")
    ] = False
    include_obfuscation: bool | None = None


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Strict):
    """A JSON schema, as OpenAI's API wraps it."""

    name: Annotated[str, Field(description="Has no effect.", min_length=1, max_length=64)]
    description: Annotated[str | None, Field(description="Has no effect.")] = None
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: Annotated[
        bool | None, Field(description="Has no effect: a schema is always followed.")
    ] = None


class JsonSchemaFormat(Strict):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Discriminator("type")]


class TemplateArguments(Strict):
    """Arguments of the model's chat template."""

    enable_thinking: Annotated[
        bool | None,
        Field(description="Whether the model reasons before its answer, if it has that switch."),
    ] = None


class ChatRequest(Strict):
    """A conversation to answer, and how."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "mine",
                    "messages": [{"role": "user", "content": "What color is it?"}],
                    "max_tokens": 16,
                }
            ]
        }
    )

    model: Annotated[
        str,
        Field(description="The name of a served model or adapter.", min_length=1, max_length=200),
    ]
    messages: Annotated[
        list[ChatMessage],
        Field(
            description="The conversation.",
            min_length=1,
            max_length=MOST_MESSAGES,
            fail_fast=True,
        ),
    ]
    stream: Annotated[
        bool | None, Field(description="Whether the answer comes in pieces, as events.")
    ] = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[
        int | None, Field(ge=1, description="The most tokens of an answer; 128 by default.")
    ] = None
    max_completion_tokens: Annotated[
        int | None, Field(ge=1, description="The newer name of max_tokens.")
    ] = None
    n: Annotated[int | None, Field(ge=1, le=MOST_ANSWERS, description="The number of answers.")] = (
        None
    )
    temperature: Annotated[
        float | None,
        Field(
            ge=0,
            le=2,
            allow_inf_nan=False,
            description="0 takes the likeliest token each time. The default is 0, and 1 where n, "
            "top_p, top_k or min_p ask for draws.",
        ),
    ] = None
    top_p: Annotated[
        float | None,
        Field(ge=0, le=1, allow_inf_nan=False, description="Nucleus sampling, as transformers'."),
    ] = None
    top_k: Annotated[
        int | None,
        Field(ge=-1, le=1_000_000, description="Likeliest tokens to draw from; 0 or -1 for all."),
    ] = None
    min_p: Annotated[
        float | None,
        Field(
            ge=0,
            le=1,
            allow_inf_nan=False,
            description="As transformers': a share of the likeliest's.",
        ),
    ] = None
    seed: Annotated[
        int | None,
        Field(ge=-(2**63), le=2**63 - 1, description="Of the draws: the same seed draws the same."),
    ] = None
    repetition_penalty: Annotated[
        float | None, Field(ge=0.01, le=100, allow_inf_nan=False, description="As transformers'.")
    ] = None
    num_beams: Annotated[
        int | None, Field(ge=1, le=MOST_ANSWERS, description="Beams of a beam search; 1: none.")
    ] = None
    stop: Annotated[
        Stop | None,
        Field(description="Texts that end an answer, which is cut before them."),
    ] = None
    logprobs: Annotated[
        bool | None, Field(description="Whether tokens come with their log-probabilities.")
    ] = None
    top_logprobs: Annotated[
        int | None,
        Field(ge=0, le=MOST_TOP, description="Likeliest tokens in each place, with logprobs."),
    ] = None
    choices: Annotated[
        Annotated[list[str], Field(min_length=2, max_length=MOST_CHOICES)] | None,
        Field(description="Texts of which the likeliest is the answer, with all probabilities."),
    ] = None
    presence_penalty: Annotated[
        float | None, Field(ge=0, le=0, description="0: there is none; see repetition_penalty.")
    ] = None
    frequency_penalty: Annotated[
        float | None, Field(ge=0, le=0, description="0: there is none; see repetition_penalty.")
    ] = None
    response_format: Annotated[
        ResponseFormat | None,
        Field(description="What the answer's text is: any text, a JSON object, JSON of a schema."),
    ] = None
    chat_template_kwargs: TemplateArguments | None = None
    reasoning_effort: Annotated[
        Literal["none"] | None,
        Field(description="none: without reasoning, as with enable_thinking: false."),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _without_idle_fields(cls, fields: Any) -> Any:
        """Leaves out fields of OpenAI's API that change nothing, and idle ones of others."""
        if not isinstance(fields, Mapping):
            return fields
        return {name: field for name, field in fields.items() if not changes_nothing(name, field)}


# --- answers --------------------------------------------------------------------------------------


class TopLogprob(BaseModel):
    """A token with its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of an answer, and the likeliest ones at its place."""

    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    """The log-probabilities of an answer's tokens."""

    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    """An answer's text, and of a model that reasons what was before it."""

    role: Literal["assistant"] = "assistant"
    content: str
    reasoning_content: str | None = None
    refusal: None = None


class CompletionChoice(BaseModel):
    """One of the answers. `probabilities` are those of a request's `choices`."""

    index: int
    message: AnswerMessage
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"]
    probabilities: dict[str, float] | None = None


class Usage(BaseModel):
    """Numbers of tokens; a prompt's include those of its images."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """The answers to a request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Delta(BaseModel):
    """More text of an answer, or of the reasoning before it."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None


class ChunkChoice(BaseModel):
    """One of the answers, in a chunk."""

    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    probabilities: dict[str, float] | None = None


class Chunk(BaseModel):
    """An event of a stream. A last one may have the numbers of tokens and no choices."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A served model. `parent` is the model whose base an adapter shares."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vlm_tune"
    parent: str | None = None
    max_model_len: int
    max_images: int
    max_tokens: int


class ModelList(BaseModel):
    """The served models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """The state of the server: it takes requests, stops, or has an engine that failed."""

    status: Literal["ok", "draining", "failed"]


class ErrorDetail(BaseModel):
    """The fault of a request."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error."""

    error: ErrorDetail
