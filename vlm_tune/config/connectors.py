"""The recipe's `model.connector`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vlm_tune.config.base import Config, HomePath, Layers, PositiveInt, Side, Width


class Projector(Config):
    """Options shared by all connectors without a `base`."""

    norm: bool = Field(
        default=False,
        description="a LayerNorm on the tower's features first; for towers that end without one",
    )
    weights: HomePath | None = Field(
        default=None,
        description="start from a safetensors file or a vision-language model; random weights"
        " by default",
    )


NEWLINE = Field(
    default=False,
    description="a learned token at the end of each row of an image's joined tiles, with"
    " model.tower.split: {kind: llava_next} or {kind: llava_onevision}",
)


class LinearConnector(Projector):
    """One linear projection from the tower's width to the LLM's."""

    kind: Literal["linear"]
    newline: bool = NEWLINE


class MlpConnector(Projector):
    """`depth` linear layers with GELU between them (LLaVA-1.5 takes 2)."""

    kind: Literal["mlp"]
    depth: Annotated[int, Field(ge=2, le=8)] = 2
    bias: bool = Field(default=True, description="whether the linear layers have biases")
    newline: bool = NEWLINE


Depth = Annotated[int, Field(ge=1, le=8)]


class PixelShuffleConnector(Projector):
    """Joins factor x factor tokens into one by channel, then `depth` linear layers.

    As in Idefics3 and InternVL.
    """

    kind: Literal["pixel_shuffle"]
    factor: Annotated[int, Field(ge=2, le=8)] = Field(
        default=2, description="factor by which the grid shrinks in each direction"
    )
    depth: Depth = Field(
        default=2, description="linear layers with GELU between them (Idefics3 and SmolVLM have 1)"
    )
    bias: bool = Field(
        default=True, description="whether the linear layers have biases (Idefics3's has none)"
    )


class AvgPoolConnector(Projector):
    """Average pooling to a grid x grid of tokens, then `depth` linear layers."""

    kind: Literal["avg_pool"]
    grid: Side = Field(description="an image takes grid x grid tokens")
    depth: Depth = 2


class Gemma3Connector(Config):
    """Average pooling to a grid x grid of tokens, an RMSNorm and one matrix (Gemma 3)."""

    kind: Literal["gemma3"]
    grid: Side = Field(default=16, description="an image takes grid x grid tokens")
    eps: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=1e-6, description="what the norm adds to the mean square"
    )
    weights: HomePath | None = Field(
        default=None,
        description="start from a safetensors file or a vision-language model; random weights"
        " by default",
    )


class PatchMergerConnector(Config):
    """An RMSNorm, a matrix that joins factor x factor tokens, and an MLP of two layers (Mistral 3).

    For towers that keep an image's shape.
    """

    kind: Literal["patch_merger"]
    factor: Annotated[int, Field(ge=1, le=4)] = Field(
        default=2, description="patches per side of a square; a square takes one slot"
    )
    bias: bool = Field(default=False, description="whether the MLP's layers have biases")
    eps: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=1e-5, description="what the norm adds to the mean square"
    )
    weights: HomePath | None = Field(
        default=None,
        description="start from a safetensors file or a vision-language model; random weights"
        " by default",
    )


OfAnyShape = LinearConnector | MlpConnector | PatchMergerConnector
"""Connectors for towers that keep an image's shape: each token or square becomes one token."""


class ResamplerConnector(Projector):
    """A Perceiver resampler: learned latents attend to features in `depth` layers (Flamingo)."""

    kind: Literal["resampler"]
    latents: Width = Field(default=64, description="number of tokens per image")
    depth: Layers = 6
    heads: Width = 8
    head_width: Width | None = Field(
        default=None, description="width of a head; the tower's width / heads by default"
    )


class QFormerConnector(Projector):
    """A Q-Former: learned queries attend to the features (BLIP-2, InstructBLIP).

    With `text: true` they also attend to the question.
    """

    kind: Literal["qformer"]
    queries: Width = Field(default=32, description="number of tokens per image")
    width: Width = 768
    depth: Layers = Field(default=12, description="layers")
    heads: Width = 12
    every: PositiveInt = Field(
        default=2, description="every n-th layer, from the first, attends to the features"
    )
    text: bool = Field(
        default=False,
        description="the instruction joins the queries in self-attention (InstructBLIP)",
    )
    max_text: PositiveInt = Field(
        default=512, description="maximum tokens of an instruction; the last ones are read"
    )
    tokenizer: HomePath | None = Field(
        default=None,
        description="tokenizer for the instruction, with word embeddings of its own; the "
        "LLM's by default",
    )
    vocab_size: PositiveInt | None = Field(
        default=None, description="rows of the connector's own word embeddings, with `tokenizer`"
    )


BaseConnector = (
    LinearConnector
    | MlpConnector
    | PixelShuffleConnector
    | AvgPoolConnector
    | Gemma3Connector
    | PatchMergerConnector
    | ResamplerConnector
)
"""Connectors that can be the `base` of another connector."""


class FusionConnector(Config):
    """Combines each token of `base` with the instruction.

    Image and text features are thus fused before the LLM.
    """

    kind: Literal["fusion"]
    how: Literal["concat", "attention", "gate", "product", "bilinear"]
    base: Annotated[BaseConnector, Field(discriminator="kind")] = MlpConnector(kind="mlp")
    heads: Width = Field(default=8, description="attention heads, with how: attention")
    rank: Width | None = Field(
        default=None,
        description="width of the product or number of bilinear forms; the LLM's width if not "
        "given",
    )
    factors: Width = Field(default=4, description="rank of each bilinear form")


class CrossAttentionConnector(Config):
    """Gated cross-attention blocks before every n-th layer of the LLM (Flamingo).

    They attend to the tokens of `base`.
    """

    kind: Literal["cross_attention"]
    every: PositiveInt = Field(
        default=4, description="a block before every n-th layer, the n-th first"
    )
    heads: Width = 8
    head_width: Width | None = Field(
        default=None, description="width of a head; the LLM's width / heads by default"
    )
    images: Literal["last", "all"] = Field(
        default="last",
        description="the images before it that a token sees: the last run of adjacent ones, or all",
    )
    base: Annotated[BaseConnector, Field(discriminator="kind")] = ResamplerConnector(
        kind="resampler"
    )


class NativeConnector(Config):
    """Stands for the connector inside a native model, which brings its weights."""

    kind: Literal["native"] = "native"
    weights: None = None


RecipeConnector = BaseConnector | QFormerConnector | FusionConnector | CrossAttentionConnector


AnyConnector = RecipeConnector | NativeConnector
