"""The recipe's `model.tower`, and the ways of cutting images."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from vlm_tune.config.base import Config, HomePath, PositiveInt, Side


class Idefics3Split(Config):
    """Tiles with markers of their rows and columns, then the whole image (Idefics3, SmolVLM)."""

    kind: Literal["idefics3"]
    longest_edge: Annotated[int, Field(ge=16, le=4096)] = Field(
        description="pixels to which an image's longer side is resized before tiling; tiles "
        "have the tower's image_size"
    )


class InternVLSplit(Config):
    """Tiles of the grid whose shape is nearest to the image's, then the whole image (InternVL)."""

    kind: Literal["internvl"]
    max_tiles: Annotated[int, Field(ge=1, le=64)] = Field(
        default=12, description="maximum number of tiles of an image; 1 is only the whole image"
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


class LlavaOnevisionSplit(Config):
    """As LLaVA-NeXT's, but for an image that is its row's only one (LLaVA-OneVision).

    An image among several is seen whole, made square by `resize`.
    """

    kind: Literal["llava_onevision"]
    grids: list[Grid] = Field(
        min_length=1,
        description="candidate grids [columns, rows] of tiles; the one that shows most of an image"
        " is taken",
    )
    max_tiles: Annotated[int, Field(ge=1, le=64)] = Field(
        default=9,
        description="an image takes the tokens of so many tiles at most, and up to a fifth more:"
        " the picture of more tiles is shrunk",
    )


AnySplit = Annotated[
    Idefics3Split | InternVLSplit | Gemma3Split | LlavaNextSplit | LlavaOnevisionSplit,
    Field(discriminator="kind"),
]


class Tower(Config):
    """Options shared by all vision towers."""

    image_size: Side | None = Field(
        default=None,
        description="side in pixels; the tower's own by default. Of a Pixtral's tower, which keeps "
        "an image's shape, the longest side to which larger images are shrunk",
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


Layer = Annotated[int, Field(ge=-1024, le=-1)]


class TransformersTower(Tower):
    """A vision tower from transformers: CLIP, SigLIP, DINOv2, or a vision-language model's own.

    NaFlex towers of SigLIP 2 and Pixtral's keep an image's shape.

    `name` is a hub name or a folder.
    """

    kind: Literal["transformers"]
    name: HomePath
    weights: HomePath | None = Field(
        default=None,
        description="a vision-language model that holds the tower's weights, if `name` does not",
    )
    layer: Layer | Annotated[list[Layer], Field(min_length=2, max_length=64)] = Field(
        default=-2,
        description="hidden state that is used, counted from the end (LLaVA: -2); several are "
        "joined by channel (Granite Vision: [-24, -20, -12, -1])",
    )
    final_norm: bool = Field(
        default=False,
        description="apply the tower's final norm to the features (BLIP-2, with layer: -1)",
    )
    class_token: bool = CLASS_TOKEN
    row_ends: bool = Field(
        default=False,
        description="the tokens [IMG_BREAK] and [IMG_END] after the rows of an image's tokens, with"
        " a Pixtral's tower (Pixtral, Mistral 3)",
    )
    max_num_patches: Annotated[int, Field(ge=1, le=16384)] | None = Field(
        default=None,
        description="maximum patches of an image, with a NaFlex tower (SigLIP 2), which "
        "preserves the aspect ratio; the tower's own by default",
    )

    @property
    def layers(self) -> list[int]:
        """The hidden states that are used, in the order in which they are joined."""
        return self.layer if isinstance(self.layer, list) else [self.layer]


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
        default=1, description="maximum windows of a clip; longer clips are an error"
    )
    pool: Annotated[int, Field(ge=1, le=1500)] = Field(
        default=1, description="number of adjacent tokens to average into one; a token is 20 ms"
    )


RecipeTower = OpenClipTower | TransformersTower | TimmTower | PairTower | AudioTower


class NativeTower(Tower):
    """Stands for the tower inside a native model, whose own processor prepares images."""

    kind: Literal["native"] = "native"
    min_pixels: PositiveInt | None = None
    max_pixels: PositiveInt | None = None
    video_min_pixels: PositiveInt | None = None
    video_max_pixels: PositiveInt | None = None
    video_frames: PositiveInt | None = None


AnyTower = RecipeTower | NativeTower
