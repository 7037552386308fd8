"""Requests for vectors and their answers as they stand in JSON; OpenAI's, with image parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from vlm_tune.serving.limits import MOST_INPUTS
from vlm_tune.serving.wire import ImagePart, Strict, TextPart

TOKENS = "token_ids"
"""pydantic's type of the error of an input that is token ids."""


def _entry_form(entry: Any) -> str | None:
    if isinstance(entry, Mapping):
        return str(entry.get("type")) if "type" in entry else None
    return getattr(entry, "type", "plain")


def _input_form(entries: Any) -> str:
    return "list" if isinstance(entries, list) else "plain"


def _no_tokens(entry: Any) -> Any:
    """Refuses token ids, which OpenAI's API takes: another model's tokens mean nothing here."""
    if isinstance(entry, int | list):
        raise PydanticCustomError(TOKENS, "token ids are not taken; send texts")
    return entry


Plain = Annotated[str, BeforeValidator(_no_tokens)]
Entry = Annotated[
    Annotated[Plain, Tag("plain")]
    | Annotated[TextPart, Tag("text")]
    | Annotated[ImagePart, Tag("image_url")],
    Discriminator(
        _entry_form,
        custom_error_type="input_part",
        custom_error_message="an input is a text, or a part of type text or image_url",
    ),
]
Input = Annotated[
    Annotated[Plain, Tag("plain")]
    | Annotated[
        list[Entry], Tag("list"), Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True)
    ],
    Discriminator(_input_form),
]


class EmbeddingsRequest(Strict):
    """Texts and images whose vectors are wanted."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "mine", "input": ["red", "a blue circle"]}]}
    )

    model: Annotated[
        str,
        Field(description="The name of a served model or adapter.", min_length=1, max_length=200),
    ]
    input: Annotated[
        Input,
        Field(
            description="A text, or a list of texts and of parts as in a message: each has a "
            "vector of its own."
        ),
    ]
    encoding_format: Annotated[
        Literal["float", "base64"] | None,
        Field(description="Numbers, by default, or the base64 of little-endian fp32."),
    ] = None
    dimensions: Annotated[
        int | None,
        Field(ge=1, description="The length of the vectors: the model's, if it is given."),
    ] = None
    user: Annotated[str | None, Field(description="Has no effect.")] = None


class Embedding(BaseModel):
    """The unit vector of an input: numbers, or base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Numbers of tokens, those of images included."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """The vectors of the inputs, in their order."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
