"""The recipe's `model`: a tower, a connector and a language model, or a checkpoint."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_serializer

from vlm_tune.config.base import Config, HomePath
from vlm_tune.config.boxes import Boxes
from vlm_tune.config.connectors import (
    MlpConnector,
    NativeConnector,
    RecipeConnector,
)
from vlm_tune.config.native import NativeModel
from vlm_tune.config.towers import (
    NativeTower,
    RecipeTower,
    Tower,
)


class Scratch(Config):
    """An LLM with random initial weights and a tokenizer trained on the recipe's own text."""

    config: dict[str, Any] = Field(
        description="keys of the transformers config (d_model, num_layers, ...)"
    )
    model_type: str = Field(description="transformers' model type: t5, llama, gpt2, ...")
    vocab_size: Annotated[int, Field(ge=300, le=10_000_000)] = Field(
        default=512, description="vocabulary size of the byte-level BPE tokenizer"
    )


Attention = Literal["auto", "eager", "sdpa", "flex"]

ATTENTION: Attention = Field(
    default="auto",
    description="how the LLM attends: `auto` chooses by the device and the model; `eager` (matrix "
    "products) and `sdpa` (torch's fused attention) are transformers' own, by masks; `flex` is "
    "FlexAttention on CUDA, for a decoder's joined rows of any length and a T5 without dropout",
)


class Llm(Config):
    """The language model: an encoder-decoder (`seq2seq`: T5, Flan-T5) or a decoder (`causal`)."""

    kind: Literal["causal", "seq2seq"]
    name: HomePath | None = Field(default=None, description="a hub name or a local folder")
    gguf_file: str | None = Field(
        default=None, description="a GGUF file in `name`, dequantized when loaded"
    )
    scratch: Scratch | None = None
    quantize: Literal["nf4", "fp4", "int8"] | None = Field(
        default=None, description="load the frozen linear layers in 4 or 8 bit"
    )
    attention: Attention = ATTENTION
    bidirectional: Literal["images", "prompt"] | None = Field(
        default=None,
        description="tokens of a decoder with bidirectional attention, where others attend to "
        "earlier ones only: `images`, those of one image (Gemma 3); `prompt`, all "
        "before the answer (PaliGemma)",
    )
    added_tokens: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[],
        description="tokens to add to the vocabulary, e.g. <loc_1>; their embeddings are trained",
    )
    added_special_tokens: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[],
        description="like added_tokens, but marked as special, so that decoding can skip them",
    )

    @property
    def words(self) -> list[str]:
        """All tokens to add to the vocabulary, plain and special."""
        return [*self.added_tokens, *self.added_special_tokens]


class ModelSection(Config):
    """A model built from a vision tower, a connector and a language model."""

    tower: Annotated[RecipeTower, Field(discriminator="kind")]
    connector: Annotated[RecipeConnector, Field(discriminator="kind")] = MlpConnector(kind="mlp")
    llm: Llm
    boxes: Boxes = Boxes()


class NativeLlm(Llm):
    """A whole model of transformers, which is called as it is; `name` is the checkpoint's."""

    kind: Literal["causal", "seq2seq"] = "causal"


class NativeSection(Config):
    """The parts of a native model in a saved model's config."""

    tower: NativeTower = NativeTower()
    connector: NativeConnector = NativeConnector()
    llm: NativeLlm
    boxes: Boxes = Boxes()


AnySection = ModelSection | NativeSection
"""The parts of a saved model."""


def _section_form(value: Any) -> str:
    """Returns the name of the class that describes a saved model's parts."""
    tower = value.get("tower") if isinstance(value, dict) else value.tower
    kind = tower.get("kind") if isinstance(tower, dict) else getattr(tower, "kind", None)
    return NativeSection.__name__ if kind == "native" else ModelSection.__name__


SavedSection = Annotated[
    Annotated[ModelSection, Tag(ModelSection.__name__)]
    | Annotated[NativeSection, Tag(NativeSection.__name__)],
    Discriminator(_section_form),
]
"""`AnySection` in a config that is read from a file."""


class PretrainedLlm(Config):
    """Options for the language model of an existing vision-language model."""

    quantize: Literal["nf4", "fp4", "int8"] | None = Field(
        default=None, description="load the frozen linear layers in 4 or 8 bit"
    )
    attention: Attention = ATTENTION
    added_tokens: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[],
        description="tokens to add to the vocabulary, e.g. <loc_1>; their embeddings are trained",
    )
    added_special_tokens: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[],
        description="like added_tokens, but marked as special, so that decoding can skip them",
    )

    @property
    def words(self) -> list[str]:
        """All tokens to add to the vocabulary, plain and special."""
        return [*self.added_tokens, *self.added_special_tokens]


class PretrainedModel(Config):
    """An existing vision-language model to start from (LLaVA-1.5, BLIP-2, SmolVLM and others).

    Its tower, connector and LLM are used. Options set under `tower` override the checkpoint's own.
    """

    pretrained: HomePath = Field(description="a hub name or a local folder")
    tower: Tower = Tower()
    llm: PretrainedLlm = PretrainedLlm()
    boxes: Boxes | None = Field(
        default=None,
        description=(
            "how the model reads and writes boxes and points; by default as its family does"
        ),
    )

    @field_serializer("tower")
    def _set_options(self, tower: Tower) -> dict[str, Any]:
        # Read back from a file, options that were not set would override the checkpoint's.
        return tower.model_dump(exclude_unset=True)


def _model_form(value: Any) -> str:
    """Returns the name of the class that describes a recipe's model.

    It describes its parts, a checkpoint that is taken apart, or one that is called as it is.
    """
    if isinstance(value, NativeModel) or (
        isinstance(value, dict) and value.get("kind") is not None
    ):
        return NativeModel.__name__
    named = "pretrained" in value if isinstance(value, dict) else isinstance(value, PretrainedModel)
    return PretrainedModel.__name__ if named else ModelSection.__name__


AnyModel = Annotated[
    Annotated[ModelSection, Tag(ModelSection.__name__)]
    | Annotated[PretrainedModel, Tag(PretrainedModel.__name__)]
    | Annotated[NativeModel, Tag(NativeModel.__name__)],
    Discriminator(_model_form),
]
