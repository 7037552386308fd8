"""The recipe's `model`: towers, connectors, language models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from vlm_tune.config.base import Config, HomePath, Layers, PositiveInt, Side, Width
from vlm_tune.config.boxes import Boxes
from vlm_tune.config.native import NativeModel


class Idefics3Split(Config):
    """Tiles with markers of their rows and columns, then the whole image (Idefics3, SmolVLM)."""

    kind: Literal["idefics3"]
    longest_edge: Annotated[int, Field(ge=16, le=4096)] = Field(
        description="pixels to which an image's longer side is resized before it is cut; tiles are "
        "of the tower's image_size, and as many as that takes"
    )


class InternVLSplit(Config):
    """Tiles of the grid whose shape is nearest to the image's, then the whole image (InternVL)."""

    kind: Literal["internvl"]
    max_tiles: Annotated[int, Field(ge=1, le=64)] = Field(
        default=12, description="largest number of tiles of an image; 1 is the whole image alone"
    )


class Gemma3Split(Config):
    """The whole image between the markers of Gemma 3, without crops of it."""

    kind: Literal["gemma3"]


Grid = Annotated[list[Annotated[int, Field(ge=1, le=64)]], Field(min_length=2, max_length=2)]


class LlavaNextSplit(Config):
    """The whole image, then tiles that are joined again without padding (LLaVA-NeXT)."""

    kind: Literal["llava_next"]
    grids: list[Grid] = Field(
        min_length=1,
        description="candidate grids [columns, rows] of tiles; the one that shows most of an image"
        " is taken",
    )


AnySplit = Annotated[
    Idefics3Split | InternVLSplit | Gemma3Split | LlavaNextSplit, Field(discriminator="kind")
]


class Tower(Config):
    """Options shared by all vision towers."""

    image_size: Side | None = Field(
        default=None, description="side in pixels; the tower's own by default"
    )
    resize: Literal["squash", "crop", "pad"] = Field(
        default="crop", description="how a non-square image is made square"
    )
    grid: Side | None = Field(
        default=None, description="average-pool the patch features to grid x grid tokens"
    )
    tiles: list[Grid] = Field(
        default=[],
        description="anyres: candidate grids [columns, rows] of tiles; the whole image plus "
        "the tiles of the best grid",
    )
    split: AnySplit | None = Field(
        default=None,
        description="the way in which a model that was made with tiles and markers cuts images, in "
        "place of `resize` and `tiles`",
    )


CLASS_TOKEN = Field(
    default=False, description="prepend the features of the class token, if the tower has one"
)


class OpenClipTower(Tower):
    """A CLIP vision tower from open_clip.

    Give a name with a `pretrained` tag or file, or a `config` to start from random weights.
    """

    kind: Literal["open_clip"]
    name: str | None = Field(
        default=None,
        description="an open_clip model, e.g. ViT-B-32, hf-hub:owner/name or local-dir:folder",
    )
    pretrained: HomePath | None = Field(
        default=None,
        description="an open_clip tag (openai, laion2b_s34b_b79k) or a safetensors file",
    )
    config: dict[str, Any] | None = Field(
        default=None, description="an open_clip `vision_cfg`; random weights"
    )
    layer: int = Field(
        default=-1,
        ge=-1024,
        le=-1,
        description="block whose output is used, counted from the end (LLaVA: -2)",
    )
    class_token: bool = CLASS_TOKEN


class TransformersTower(Tower):
    """A vision tower from transformers: CLIP, SigLIP, DINOv2, or a vision-language model's own.

    `name` is a hub name or a folder.
    """

    kind: Literal["transformers"]
    name: HomePath
    weights: HomePath | None = Field(
        default=None,
        description="a vision-language model that holds the tower's weights, if `name` does not",
    )
    layer: int = Field(
        default=-2,
        ge=-1024,
        le=-1,
        description="hidden state that is used, counted from the end (LLaVA: -2)",
    )
    final_norm: bool = Field(
        default=False,
        description="apply the tower's final norm to the features (BLIP-2, with layer: -1)",
    )
    class_token: bool = CLASS_TOKEN


class TimmTower(Tower):
    """Feature maps of a timm backbone, pooled to one grid and concatenated along channels."""

    kind: Literal["timm"]
    name: str
    pretrained: HomePath | bool = Field(
        default=False, description="true for timm's own weights, or a safetensors file"
    )
    stages: list[Annotated[int, Field(ge=-64, le=63)]] = Field(
        default=[-1], min_length=1, description="feature maps to use, as timm's out_indices"
    )
    grid: Side | None = Field(default=7, description="grid to which each feature map is pooled")
    class_token: bool = CLASS_TOKEN


SingleTower = Annotated[OpenClipTower | TransformersTower | TimmTower, Field(discriminator="kind")]


class PairTower(Tower):
    """Two towers that see the same image, each at its own size; features are joined by channel.

    Where not given, `image_size` is the larger of the two. Features of both are pooled to `grid`,
    or to the coarser of their grids.
    """

    kind: Literal["pair"]
    towers: list[SingleTower] = Field(min_length=2, max_length=2)


class AudioTower(Config):
    """A Whisper encoder of transformers, in place of an image tower: the model hears audio clips.

    Give a `name`, a hub name or a folder, or a `config` to start from random weights.
    """

    kind: Literal["audio"]
    name: HomePath | None = Field(default=None, description="a hub name or a local folder")
    config: dict[str, Any] | None = Field(
        default=None, description="keys of transformers' WhisperConfig; random weights"
    )
    seconds: Annotated[int, Field(ge=1, le=30)] | None = Field(
        default=None,
        description="length of the window that the tower takes at once; the tower's own by default "
        "(Whisper: 30). Shorter clips are filled with silence",
    )
    windows: Annotated[int, Field(ge=1, le=120)] = Field(
        default=1, description="most windows of a clip; longer ones are an error"
    )
    pool: Annotated[int, Field(ge=1, le=1500)] = Field(
        default=1, description="average so many adjacent tokens into one; a token is 20 ms"
    )


RecipeTower = OpenClipTower | TransformersTower | TimmTower | PairTower | AudioTower


class NativeTower(Tower):
    """Stands for the tower inside a native model, whose own processor prepares images."""

    kind: Literal["native"] = "native"
    min_pixels: PositiveInt | None = None
    max_pixels: PositiveInt | None = None


AnyTower = RecipeTower | NativeTower


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
    " model.tower.split: {kind: llava_next}",
)


class LinearConnector(Projector):
    """One linear projection from the tower's width to the LLM's."""

    kind: Literal["linear"]
    newline: bool = NEWLINE


class MlpConnector(Projector):
    """`depth` linear layers with GELU between them (LLaVA-1.5 takes 2)."""

    kind: Literal["mlp"]
    depth: Annotated[int, Field(ge=2, le=8)] = 2
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


class ResamplerConnector(Projector):
    """A Perceiver resampler: learned latents attend to features in `depth` layers (Flamingo)."""

    kind: Literal["resampler"]
    latents: Width = Field(default=64, description="tokens an image takes")
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
    queries: Width = Field(default=32, description="tokens an image takes")
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
        description="tokens of a decoder that see each other both ways, where others see earlier "
        "ones alone: `images`, those of one image (Gemma 3); `prompt`, all before the answer "
        "(PaliGemma)",
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
        description="how it reads and writes boxes and points; as its family does by default",
    )


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
