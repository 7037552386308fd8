"""The recipe: typed, strict, and the one description of a run."""

from __future__ import annotations

from copy import deepcopy
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, PrivateAttr, Tag

from vlm_tune.config.yaml_source import Located, Path
from vlm_tune.paths import home

Fraction = Annotated[float, Field(ge=0, le=1)]
LARGEST = 2**31 - 1
PositiveInt = Annotated[int, Field(gt=0, le=LARGEST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e9)]
Side = Annotated[int, Field(ge=1, le=16_384)]
"""Of an image or a grid, in pixels or tokens."""
Width = Annotated[int, Field(ge=1, le=131_072)]
"""Of a layer, a rank, or a number of heads or learned vectors."""
Layers = Annotated[int, Field(ge=1, le=1024)]
Processes = Annotated[int, Field(ge=0, le=4096)]
HomePath = Annotated[str, AfterValidator(home)]
"""A path, whose `~` is the user's home folder, or a name."""
LearningRate = Annotated[float, Field(gt=0, le=100)]
Decay = Annotated[float, Field(ge=0, lt=1)]
"""How much of a running mean is kept at each step: at 1 nothing new would enter it."""


class Places:
    """Where a recipe's values stand in its file; no part of what the recipe says, so any two are equal."""

    def __init__(self, located: Located | None = None) -> None:
        self._located = located

    def where(self, path: Path) -> str:
        """`file:line:column` of a value that was read, else its dotted name."""
        return ".".join(map(str, path)) if self._located is None else self._located.where(path, key=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Places)

    __hash__ = None  # type: ignore[assignment]


class Config(BaseModel):
    """Base of every part of a recipe: unknown keys and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=(), allow_inf_nan=False)


# --- model -----------------------------------------------------------------------------------------------------------


class Tower(Config):
    """What every vision tower can be told."""

    image_size: Side | None = Field(default=None, description="side in pixels; the tower's own where not given")
    resize: Literal["squash", "crop", "pad"] = Field(default="crop", description="how an image that is not square becomes square")
    grid: Side | None = Field(default=None, description="average-pool the patch features to grid x grid tokens")
    tiles: list[Annotated[list[Annotated[int, Field(ge=1, le=64)]], Field(min_length=2, max_length=2)]] = Field(
        default=[],
        description="anyres: grids [columns, rows] of image_size tiles; the whole image, then the tiles of the grid that fits best",
    )


CLASS_TOKEN = Field(default=False, description="the class token's features first, where the tower has one")


class OpenClipTower(Tower):
    """A CLIP vision tower from open_clip: a name with a `pretrained` tag or file, or a `config` built from scratch."""

    kind: Literal["open_clip"]
    name: str | None = Field(default=None, description="an open_clip model, as ViT-B-32, or hf-hub:owner/name, or local-dir:folder")
    pretrained: HomePath | None = Field(default=None, description="an open_clip tag (openai, laion2b_s34b_b79k) or a safetensors file")
    config: dict[str, Any] | None = Field(default=None, description="an open_clip `vision_cfg`, randomly initialised")
    layer: int = Field(default=-1, ge=-1024, le=-1, description="which block's output, counted from the end (LLaVA takes -2)")
    class_token: bool = CLASS_TOKEN


class TransformersTower(Tower):
    """A vision tower from transformers (CLIP, SigLIP, DINOv2, or a vision-language model's own): a hub name or a folder."""

    kind: Literal["transformers"]
    name: HomePath
    weights: HomePath | None = Field(
        default=None, description="a vision-language model that holds the tower's weights, where `name` does not"
    )
    layer: int = Field(default=-2, ge=-1024, le=-1, description="which hidden state, counted from the end (LLaVA takes -2)")
    final_norm: bool = Field(default=False, description="the tower's last norm on the features (BLIP-2, with layer: -1)")
    class_token: bool = CLASS_TOKEN


class TimmTower(Tower):
    """Feature maps of a timm backbone, pooled to one grid and concatenated by channel."""

    kind: Literal["timm"]
    name: str
    pretrained: HomePath | bool = Field(default=False, description="true for timm's own weights, or a safetensors file")
    stages: list[Annotated[int, Field(ge=-64, le=63)]] = Field(
        default=[-1], min_length=1, description="which feature maps, as timm's out_indices"
    )
    grid: Side | None = Field(default=7, description="the grid every feature map is pooled to")
    class_token: bool = CLASS_TOKEN


SingleTower = Annotated[OpenClipTower | TransformersTower | TimmTower, Field(discriminator="kind")]


class PairTower(Tower):
    """Two towers side by side: an image goes to both, each in its own size, and their features are joined by channel.

    `image_size` is the larger of theirs where not given; both are pooled to `grid`, or to the coarser of their grids.
    """

    kind: Literal["pair"]
    towers: list[SingleTower] = Field(min_length=2, max_length=2)


AnyTower = OpenClipTower | TransformersTower | TimmTower | PairTower


class Projector(Config):
    """What every connector can be told."""

    norm: bool = Field(default=False, description="a LayerNorm on the tower's features first; for towers that end without one")
    weights: HomePath | None = Field(
        default=None, description="where it starts from: a safetensors file, or a vision-language model; random where not given"
    )


class LinearConnector(Projector):
    """One linear projection from the tower's width to the LLM's."""

    kind: Literal["linear"]


class MlpConnector(Projector):
    """`depth` linear layers with GELU between them (LLaVA-1.5 takes 2)."""

    kind: Literal["mlp"]
    depth: Annotated[int, Field(ge=2, le=8)] = 2


Depth = Annotated[int, Field(ge=1, le=8)]


class PixelShuffleConnector(Projector):
    """Squares of factor x factor tokens become one, joined by channel, then `depth` linear layers (Idefics3, InternVL)."""

    kind: Literal["pixel_shuffle"]
    factor: Annotated[int, Field(ge=2, le=8)] = Field(default=2, description="the tower's grid is this many times smaller, each way")
    depth: Depth = Field(default=2, description="linear layers with GELU between them (Idefics3 and SmolVLM have 1)")


class AvgPoolConnector(Projector):
    """The mean over each cell of a grid x grid pattern, then `depth` linear layers."""

    kind: Literal["avg_pool"]
    grid: Side = Field(description="an image takes grid x grid tokens")
    depth: Depth = 2


class ResamplerConnector(Projector):
    """A Perceiver resampler: learned latents read the features in `depth` layers (Flamingo)."""

    kind: Literal["resampler"]
    latents: Width = Field(default=64, description="tokens an image takes")
    depth: Layers = 6
    heads: Width = 8
    head_width: Width | None = Field(default=None, description="the tower's width / heads where not given")


class QFormerConnector(Projector):
    """A Q-Former: learned queries read the features, and the question where `text` is true (BLIP-2, InstructBLIP)."""

    kind: Literal["qformer"]
    queries: Width = Field(default=32, description="tokens an image takes")
    width: Width = 768
    depth: Layers = Field(default=12, description="layers")
    heads: Width = 12
    every: PositiveInt = Field(default=2, description="every n-th layer, from the first, attends to the features")
    text: bool = Field(default=False, description="the instruction joins the queries in self-attention (InstructBLIP)")
    max_text: PositiveInt = Field(default=512, description="the last tokens of an instruction that are read")
    tokenizer: HomePath | None = Field(
        default=None, description="reads the instruction by this tokenizer and word embeddings of its own; else by the LLM's"
    )
    vocab_size: PositiveInt | None = Field(default=None, description="rows of its own word embeddings, with `tokenizer`")


BaseConnector = LinearConnector | MlpConnector | PixelShuffleConnector | AvgPoolConnector | ResamplerConnector
"""Connectors that others build on."""


class FusionConnector(Config):
    """The tokens of `base`, each combined with the instruction: image and text features fused before the LLM."""

    kind: Literal["fusion"]
    how: Literal["concat", "attention", "gate", "product", "bilinear"]
    base: Annotated[BaseConnector, Field(discriminator="kind")] = MlpConnector(kind="mlp")
    heads: Width = Field(default=8, description="of how: attention")
    rank: Width | None = Field(default=None, description="width of the product or number of bilinear forms; the LLM's width if not given")
    factors: Width = Field(default=4, description="rank of each bilinear form")


class CrossAttentionConnector(Config):
    """Gated cross-attention blocks before every n-th layer of the LLM, which look at the tokens of `base` (Flamingo)."""

    kind: Literal["cross_attention"]
    every: PositiveInt = Field(default=4, description="a block before every n-th layer, the n-th first")
    heads: Width = 8
    head_width: Width | None = Field(default=None, description="the LLM's width / heads where not given")
    images: Literal["last", "all"] = Field(
        default="last", description="the images before it that a token sees: the last run of adjacent ones, or all"
    )
    base: Annotated[BaseConnector, Field(discriminator="kind")] = ResamplerConnector(kind="resampler")


AnyConnector = BaseConnector | QFormerConnector | FusionConnector | CrossAttentionConnector


class Scratch(Config):
    """An LLM that starts from random weights, with a tokenizer trained on the recipe's own text."""

    config: dict[str, Any] = Field(description="keys of the transformers config (d_model, num_layers, ...)")
    model_type: str = Field(description="transformers' model type: t5, llama, gpt2, ...")
    vocab_size: Annotated[int, Field(ge=300, le=10_000_000)] = Field(default=512, description="of the byte-level BPE tokenizer")


class Llm(Config):
    """The language model: an encoder-decoder (`seq2seq`: T5, Flan-T5) or a decoder (`causal`)."""

    kind: Literal["causal", "seq2seq"]
    name: HomePath | None = Field(default=None, description="a hub name or a local folder")
    gguf_file: str | None = Field(default=None, description="a GGUF file in `name`, de-quantised at load")
    scratch: Scratch | None = None
    quantize: Literal["nf4", "fp4", "int8"] | None = Field(default=None, description="load frozen linear layers in 4 or 8 bit")
    added_tokens: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[], description="tokens for the vocabulary, as <loc_1>: one id wherever a text has them; their embeddings are trained"
    )
    added_special_tokens: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[], description="as added_tokens, and marked special in the tokenizer: other libraries can leave them out of answers"
    )

    @property
    def words(self) -> list[str]:
        """The tokens that are added to the vocabulary."""
        return [*self.added_tokens, *self.added_special_tokens]


class ModelSection(Config):
    """Tower, connector and LLM."""

    tower: Annotated[AnyTower, Field(discriminator="kind")]
    connector: Annotated[AnyConnector, Field(discriminator="kind")] = MlpConnector(kind="mlp")
    llm: Llm


class PretrainedLlm(Config):
    """What the language model of an existing vision-language model can be told."""

    quantize: Literal["nf4", "fp4", "int8"] | None = Field(default=None, description="load frozen linear layers in 4 or 8 bit")
    added_tokens: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[], description="tokens for the vocabulary, as <loc_1>: one id wherever a text has them; their embeddings are trained"
    )
    added_special_tokens: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[], description="as added_tokens, and marked special in the tokenizer: other libraries can leave them out of answers"
    )

    @property
    def words(self) -> list[str]:
        """The tokens that are added to the vocabulary."""
        return [*self.added_tokens, *self.added_special_tokens]


class PretrainedModel(Config):
    """An existing vision-language model (LLaVA-1.5, BLIP-2, InstructBLIP) to start from: its tower, connector and LLM.

    What is set of `tower` is used in place of what the checkpoint's own configs say.
    """

    pretrained: HomePath = Field(description="a hub name or a local folder")
    tower: Tower = Tower()
    llm: PretrainedLlm = PretrainedLlm()


def _model_form(value: Any) -> str:
    """The class that describes a recipe's model: by its parts, or one to start from."""
    named = "pretrained" in value if isinstance(value, dict) else isinstance(value, PretrainedModel)
    return PretrainedModel.__name__ if named else ModelSection.__name__


AnyModel = Annotated[
    Annotated[ModelSection, Tag(ModelSection.__name__)] | Annotated[PretrainedModel, Tag(PretrainedModel.__name__)],
    Discriminator(_model_form),
]


# --- data ------------------------------------------------------------------------------------------------------------


class Source(Config):
    """What every source can be told; rows are counted in units (a row, or an image with `group: image`)."""

    limit: PositiveInt | None = Field(default=None, description="take the first n rows only")
    weight: PositiveFloat | None = Field(default=None, description="share of every epoch, relative to the other sources")
    count: PositiveInt | None = Field(default=None, description="units of every epoch; all where neither is given")
    template: HomePath | None = Field(default=None, description="a chat format; data.template where not given")
    system: str | None = Field(default=None, description="system text for conversations that bring none; data.system where not given")


SOURCE_NAME = Field(default=None, description="what scores call the source; the file's or folder's name where not given")


class EasyVqaSource(Source):
    """The easy-VQA data set of the `easy-vqa` package; `validation` is the last images of its train part."""

    kind: Literal["easy_vqa"]
    name: str | None = SOURCE_NAME
    split: Literal["train", "validation", "test"]
    validation_images: NonNegativeInt = Field(default=200, description="how many train images are held out as `validation`")
    task: Literal["vqa", "caption"] = Field(default="vqa", description="questions, or captions of what the questions reveal")
    instructions: HomePath = Field(default="vqa", description="a prompt set of data_templates/instructions, or a file")


Form = Literal[
    "llava",
    "sharegpt",
    "messages",
    "prompt_completion",
    "alpaca",
    "cauldron",
    "vqa",
    "multiple_choice",
    "caption",
    "classify",
    "retrieval",
    "ocr",
    "translate",
]
"""What a row looks like, whatever file it is kept in."""


class RowsSource(Source):
    """What sources of rows can be told."""

    form: Form | Literal["auto"] = Field(default="auto", description="what a row looks like; detected from the first rows and named")
    columns: dict[str, str] = Field(default={}, description="our field names to the rows' own, as {question: query}")
    image_root: str | None = Field(default=None, description="where image paths start; the file's own folder where not given")
    instructions: HomePath | None = Field(default=None, description="a prompt set for plain task rows; the task's own where not given")
    ignore: list[str] = Field(
        default=[],
        description="fields of the rows to pass over: those that carry meaning are refused where a form does not read them",
    )
    null_values: list[str] | None = Field(
        default=None,
        description="texts that are missing values; of CSV and TSV, where not given, empty cells, nan, null and their like",
    )
    booleans: Annotated[list[str], Field(min_length=2, max_length=2)] = Field(
        default=["no", "yes"], description="the texts of false and true in the fields of task rows"
    )
    answer_is: Literal["auto", "index", "index_from_1", "letter", "text"] = Field(
        default="auto", description="how an answer names one of the row's choices; auto refuses a row that can be read in two ways"
    )
    shuffle_choices: bool = Field(default=False, description="show each row's choices in an order drawn from the seed and the row's id")
    shots: Annotated[int, Field(ge=0, le=16)] = Field(default=0, description="worked examples with their images before each question")
    video_frames: PositiveInt = Field(default=8, description="frames taken of a video, evenly spaced")
    video_fps: PositiveFloat | None = Field(default=None, description="of videos that are folders of frames; gives the frames their time")


class FileSource(RowsSource):
    """Rows of JSON, JSONL, CSV, TSV, Parquet or Arrow files."""

    kind: Literal["file"]
    name: str | None = SOURCE_NAME
    path: str = Field(description="a file, or a pattern as data/*.parquet")


class DatasetSource(RowsSource):
    """A data set of the datasets library: a hub name, or a folder that `save_to_disk` or `push_to_hub` wrote."""

    kind: Literal["dataset"]
    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = Field(default=None, description="a commit of the hub's data set")


class WebDatasetSource(RowsSource):
    """Tar shards whose members of one stem (0001.jpg, 0001.json) are one row."""

    kind: Literal["webdataset"]
    name: str | None = SOURCE_NAME
    path: str = Field(description="a shard, or a pattern as shards/*.tar")


class FolderSource(Source):
    """Images in one folder a class; the folder's name is the answer."""

    kind: Literal["folder"]
    name: str | None = SOURCE_NAME
    path: str
    instructions: HomePath = Field(default="classify", description="a prompt set of data_templates/instructions, or a file")


AnySource = Annotated[EasyVqaSource | FileSource | DatasetSource | WebDatasetSource | FolderSource, Field(discriminator="kind")]


class RandAugment(Config):
    """`ops` random changes of strength `magnitude` (0 to 30), as torchvision's RandAugment."""

    ops: PositiveInt = 2
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9


class Augment(Config):
    """Random changes of training images, drawn from (seed, epoch, sample id)."""

    crop: Annotated[float, Field(gt=0, le=1)] = Field(default=1.0, description="smallest share of the area that a random crop keeps")
    flip: Fraction = Field(default=0.0, description="probability of a left-right mirror image")
    transpose: Fraction = Field(default=0.0, description="probability of exchanging height and width (square images only)")
    shift: Annotated[float, Field(ge=0, le=0.5)] = Field(default=0.0, description="largest shift, as a share of the side")
    rotation: Annotated[float, Field(ge=0, le=180)] = Field(default=0.0, description="largest turn, in degrees")
    colour: Fraction = Field(default=0.0, description="largest change of brightness, contrast and saturation, as a share")
    hue: Annotated[float, Field(ge=0, le=0.5)] = Field(default=0.0, description="largest turn of the hue, as a share of the circle")
    noise: Fraction = Field(default=0.0, description="standard deviation of added Gaussian noise, as a share of white")
    rand_augment: RandAugment | None = None


class Clean(Config):
    """Rows that are left out, and counted, before anything is trained on."""

    duplicates: Literal["keep", "bytes", "perceptual"] = Field(
        default="keep", description="rows of equal text whose images are equal byte by byte, or look alike"
    )
    min_side: PositiveInt | None = Field(default=None, description="smallest side of an image, in pixels")
    min_chars: PositiveInt | None = Field(default=None, description="shortest text of a row's turns together, in characters")
    max_chars: PositiveInt | None = None
    languages: list[str] = Field(default=[], description="ISO 639-1 codes that a row's text may be in (needs the `language` extra)")


class Split(Config):
    """Parts of the train sources that are held out; rows that share an image stay together."""

    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    test: Annotated[float, Field(ge=0, lt=1)] = 0.0
    stratify: bool = Field(default=False, description="the same shares within every category")


class DataSection(Config):
    """Where samples come from and how they become tokens."""

    train: list[AnySource] = Field(min_length=1)
    validation: list[AnySource] = Field(default=[], description="scored while training; chooses the best checkpoint")
    test: list[AnySource] = Field(default=[], description="scored once, by the finished model; never used to choose")
    split: Split | None = Field(default=None, description="take validation and test from the train sources")
    template: HomePath = Field(description="a chat format of data_templates/chat, or a file")
    system: str | None = Field(default=None, description="system text for conversations that bring none")
    max_length: PositiveInt = Field(default=2048, description="longest example in tokens, image slots included")
    overlong: Literal["fail", "drop", "split", "trim"] = Field(
        default="fail", description="examples over max_length: stop; leave out; split between turns; shorten the questions' text"
    )
    on_bad_row: Literal["fail", "skip", "quarantine"] = Field(
        default="fail", description="rows that can't be used: stop; leave out; leave out and write to quarantine.jsonl"
    )
    max_bad_rows: NonNegativeInt = Field(default=100, description="with skip and quarantine: more bad rows than this is an error")
    clean: Clean = Clean()
    group: Literal["none", "image"] = Field(default="none", description="image: rows of one image are one unit of a batch")
    packing: bool = Field(default=False, description="fill each row of a batch with several samples that don't see each other")
    row_length: PositiveInt = Field(default=1024, description="longest row in tokens that grouping or packing makes")
    epoch_size: PositiveInt | None = Field(default=None, description="units of an epoch when sources have weights")
    streaming: bool = Field(default=False, description="read, check and tokenise while training; for more rows than can be prepared")
    shuffle_buffer: PositiveInt = Field(default=10_000, description="rows that a streamed epoch is shuffled within")
    own_shards: bool = Field(
        default=False, description="with streaming: each process reads its own shards or stretches of the files, not all; for many nodes"
    )
    workers: Processes | None = Field(default=None, description="processes that prepare; as many as cores where not given")
    augment: Augment | None = None


# --- tuning ----------------------------------------------------------------------------------------------------------

TRAINS_BASE = ("full", "last_layers", "norms", "biases")
"""The kinds of tuning that change the model's own weights, all of them or some."""


class TuneRule(Config):
    """What happens to the parameters whose name matches; the first rule that matches wins."""

    match: str = Field(description="a glob over names: tower.*, connector.*, llm.*, llm.model.layers.0.*")
    how: Literal["frozen", "full", "last_layers", "norms", "biases", "lora", "prompt", "prefix"]
    learning_rate: LearningRate | None = Field(default=None, description="the train section's where not given")
    layers: PositiveInt | None = Field(
        default=None, description="how many blocks train, from the last; what else matches is frozen (last_layers only)"
    )
    layer_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="the rate is multiplied by this once a block, from the top down (full and last_layers only)"
    )
    r: Width | None = Field(default=None, description="LoRA rank (lora only)")
    lora_alpha: PositiveFloat | None = Field(
        default=None, description="LoRA's scale is lora_alpha / r, or / sqrt(r) for rsLoRA (lora only)"
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(default=None, description="lora only")
    target_modules: list[str] | Literal["all-linear"] | None = Field(
        default=None, description="module names as in PEFT; all-linear leaves out the output head (lora only)"
    )
    variant: Literal["lora", "rslora", "dora"] | None = Field(
        default=None, description="rsLoRA scales by sqrt(r), DoRA learns each output's magnitude apart (lora only)"
    )
    init: Literal["default", "gaussian", "pissa"] | None = Field(
        default=None, description="A random and B zero, or both the weight's principal singular vectors (lora only)"
    )
    lora_plus_ratio: Annotated[float, Field(ge=1, le=1e6)] | None = Field(
        default=None, description="LoRA+: B's learning rate is this many times A's (lora only)"
    )
    tokens: Width | None = Field(default=None, description="virtual tokens before every row; 20 where not given (prompt and prefix only)")

    @property
    def trains_base(self) -> bool:
        """Whether the rule changes the model's own weights, all of them or some."""
        return self.how in TRAINS_BASE


# --- training --------------------------------------------------------------------------------------------------------


class LanguageModeling(Config):
    """Cross-entropy of the supervised tokens."""

    kind: Literal["language_modeling"] = "language_modeling"


class Contrastive(Config):
    """Image against caption among the batch's distinct captions, in the LLM's embedding space."""

    kind: Literal["contrastive"]
    temperature: PositiveFloat = 0.07


class Schedule(Config):
    """The learning rate's course: linear warm-up, then this."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.03, description="share of all steps")


class Checkpoints(Config):
    """When checkpoints are written and how many are kept; the best and the last always are."""

    every: PositiveInt | None = Field(default=None, description="optimizer steps; at each evaluation and the end where not given")
    keep: PositiveInt = 2
    background: bool = Field(
        default=True, description="write beside training, from a copy of what trains in the CPU's memory; false: training waits"
    )


class TrainSection(Config):
    """The training loop."""

    epochs: PositiveFloat | None = Field(default=None, description="passes over the data; give this or steps")
    steps: PositiveInt | None = Field(default=None, description="optimizer steps; give this or epochs")
    batch_size: PositiveInt = Field(default=8, description="units (rows, or images with group: image) a device and micro-batch")
    batch_tokens: PositiveInt | None = Field(default=None, description="padded tokens a device and micro-batch, instead of batch_size")
    gradient_accumulation: PositiveInt = 1
    learning_rate: LearningRate = 2e-4
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.0
    betas: list[Decay] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    schedule: Schedule = Schedule()
    max_grad_norm: PositiveFloat | None = 1.0
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    compile: Literal["auto"] | bool = Field(
        default="auto",
        description="compile the language model's blocks; auto: from 50 million parameters and 50 steps or 2,000 scored rows on",
    )
    cache_features: bool = Field(default=True, description="compute a frozen tower's features once (not with augmentation)")
    loader_workers: Processes = Field(default=0, description="processes that decode images and make batches ahead")
    log_every: PositiveInt = 10
    checkpoints: Checkpoints = Checkpoints()
    max_nonfinite: PositiveInt = Field(
        default=3, description="stop at so many steps in a row whose loss or gradient is not finite; their updates are left out"
    )
    timeout: Annotated[float, Field(gt=0, le=1e7)] = Field(
        default=1800.0, description="seconds that a process waits for the others before it gives up"
    )
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []


class EvaluateSection(Config):
    """Evaluation while training and after it."""

    every: PositiveInt | None = Field(default=None, description="optimizer steps; once an epoch where not given")
    limit: PositiveInt | None = Field(default=None, description="score the first n validation rows only")
    test_limit: PositiveInt | None = Field(default=None, description="score the first n test rows only")
    batch_size: PositiveInt = Field(default=64, description="rows")
    max_new_tokens: PositiveInt = 32
    num_beams: Layers = 1
    samples: NonNegativeInt = Field(default=12, description="how many answers the report shows before and after training")


# --- engine ----------------------------------------------------------------------------------------------------------


class AutoEngine(Config):
    """What the launch asks for: one process alone, several by DDP, or what an accelerate config names."""

    kind: Literal["auto"] = "auto"


class DdpEngine(Config):
    """Every process holds the whole model; gradients are averaged."""

    kind: Literal["ddp"]


class DeepSpeedEngine(Config):
    """DeepSpeed's ZeRO."""

    kind: Literal["deepspeed"]
    stage: Annotated[int, Field(ge=0, le=3)] = Field(
        default=2, description="what the processes share out: 1 optimizer states, 2 gradients too, 3 weights too"
    )
    offload: list[Literal["optimizer", "parameters"]] = Field(
        default=[], description="what lies in the CPU's memory: optimizer states (stage 1 to 3), weights (stage 3)"
    )
    config: dict[str, Any] = Field(default={}, description="more keys of a DeepSpeed configuration, as {zero_optimization: {...}}")


class FsdpEngine(Config):
    """torch's fully sharded data parallel, FSDP2."""

    kind: Literal["fsdp"]
    offload: bool = Field(default=False, description="weights and optimizer states lie in the CPU's memory")


AnyEngine = AutoEngine | DdpEngine | DeepSpeedEngine | FsdpEngine


class Stage(Config):
    """One stage of several: the recipe's common part with these parts changed."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    data: dict[str, Any] = {}
    tune: Annotated[list[TuneRule], Field(min_length=1)] | None = None
    objective: Annotated[LanguageModeling | Contrastive, Field(discriminator="kind")] | None = None
    train: dict[str, Any] = {}
    evaluate: dict[str, Any] = {}


class Recipe(Config):
    """A whole run: what is trained, on what, how, and where it is written."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    output: HomePath = Field(description="the run's folder")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: AnyModel
    data: DataSection
    tune: list[TuneRule] = Field(min_length=1)
    objective: Annotated[LanguageModeling | Contrastive, Field(discriminator="kind")] = LanguageModeling()
    train: TrainSection
    evaluate: EvaluateSection = EvaluateSection()
    engine: Annotated[AnyEngine, Field(discriminator="kind")] = AutoEngine()
    stages: list[Stage] = []
    _places: Places = PrivateAttr(default_factory=Places)

    def where(self, path: Path) -> str:
        """Where a value stands: `file:line:column` of a recipe that was read, else its dotted name."""
        return self._places.where(path)

    def read_from(self, located: Located) -> Recipe:
        """The recipe, which remembers where its values stand."""
        self._places = Places(located)
        return self

    @property
    def scratch(self) -> Scratch | None:
        """How the LLM is made, where it starts from random weights."""
        return self.model.llm.scratch if isinstance(self.model, ModelSection) else None

    def resolved_stages(self) -> list[tuple[str, Recipe]]:
        """Each stage's name and complete recipe, in order; one stage named `main` where none are listed."""
        if not self.stages:
            return [("main", self)]
        common = self.model_dump(exclude={"stages"}, exclude_unset=True)
        return [
            (stage.name, Recipe.model_validate(merge_parts(common, stage_changes(stage.model_dump(exclude_unset=True)))))
            for stage in self.stages
        ]


def stage_changes(stage: dict[str, Any]) -> dict[str, Any]:
    """What a stage changes in the common part; a part that is null is not given."""
    return {key: value for key, value in stage.items() if key != "name" and value is not None}


def merge_parts(common: Any, change: Any) -> Any:
    """Mappings merge key by key; a mapping with another `kind`, and anything else, replaces."""
    if isinstance(common, dict) and isinstance(change, dict) and common.get("kind") == change.get("kind", common.get("kind")):
        merged = dict(common)
        for key, value in change.items():
            merged[key] = merge_parts(common[key], value) if key in common else deepcopy(value)
        return merged
    return deepcopy(change)
