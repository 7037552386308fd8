"""The recipe: typed, strict, and the one description of a run."""

from __future__ import annotations

from copy import deepcopy
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]


class Config(BaseModel):
    """Base of every part of a recipe: unknown keys and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=(), allow_inf_nan=False)


# --- model -----------------------------------------------------------------------------------------------------------


class Tower(Config):
    """What every vision tower can be told."""

    image_size: PositiveInt | None = Field(default=None, description="side in pixels; the tower's own where not given")
    resize: Literal["squash", "crop", "pad"] = Field(default="crop", description="how an image that is not square becomes square")
    grid: PositiveInt | None = Field(default=None, description="average-pool the patch features to grid x grid tokens")


class OpenClipTower(Tower):
    """A CLIP vision tower from open_clip: a name with a `pretrained` tag or file, or a `config` built from scratch."""

    kind: Literal["open_clip"]
    name: str | None = Field(default=None, description="an open_clip model, as ViT-B-32")
    pretrained: str | None = Field(default=None, description="an open_clip tag (openai, laion2b_s34b_b79k) or a safetensors file")
    config: dict[str, Any] | None = Field(default=None, description="an open_clip `vision_cfg`, randomly initialised")
    layer: int = Field(default=-1, le=-1, description="which block's output, counted from the end (LLaVA takes -2)")


class TransformersTower(Tower):
    """A CLIP vision tower from transformers: a hub name or a folder."""

    kind: Literal["transformers"]
    name: str
    layer: int = Field(default=-2, le=-1, description="which hidden state, counted from the end (LLaVA takes -2)")


class TimmTower(Tower):
    """Feature maps of a timm backbone, pooled to one grid and concatenated by channel."""

    kind: Literal["timm"]
    name: str
    pretrained: str | bool = Field(default=False, description="true for timm's own weights, or a safetensors file")
    stages: list[int] = Field(default=[-1], min_length=1, description="which feature maps, as timm's out_indices")
    grid: PositiveInt | None = Field(default=7, description="the grid every feature map is pooled to")


class Projector(Config):
    """What every connector can be told."""

    norm: bool = Field(default=False, description="a LayerNorm on the tower's features first; for towers that end without one")


class LinearConnector(Projector):
    """One linear projection from the tower's width to the LLM's."""

    kind: Literal["linear"]


class MlpConnector(Projector):
    """`depth` linear layers with GELU between them (LLaVA-1.5 takes 2)."""

    kind: Literal["mlp"]
    depth: Annotated[int, Field(ge=2, le=8)] = 2


class Scratch(Config):
    """An LLM that starts from random weights, with a tokenizer trained on the recipe's own text."""

    config: dict[str, Any] = Field(description="keys of the transformers config (d_model, num_layers, ...)")
    model_type: str = Field(description="transformers' model type: t5, llama, gpt2, ...")
    vocab_size: Annotated[int, Field(ge=300)] = Field(default=512, description="of the byte-level BPE tokenizer")


class Llm(Config):
    """The language model: an encoder-decoder (`seq2seq`: T5, Flan-T5) or a decoder (`causal`)."""

    kind: Literal["causal", "seq2seq"]
    name: str | None = Field(default=None, description="a hub name or a local folder")
    gguf_file: str | None = Field(default=None, description="a GGUF file in `name`, de-quantised at load")
    scratch: Scratch | None = None
    quantize: Literal["int8", "nf4"] | None = Field(default=None, description="load frozen linear layers in 8 or 4 bit")


class ModelSection(Config):
    """Tower, connector and LLM."""

    tower: Annotated[OpenClipTower | TransformersTower | TimmTower, Field(discriminator="kind")]
    connector: Annotated[LinearConnector | MlpConnector, Field(discriminator="kind")] = MlpConnector(kind="mlp")
    llm: Llm


# --- data ------------------------------------------------------------------------------------------------------------


class Source(Config):
    """What every source can be told."""

    limit: PositiveInt | None = Field(default=None, description="take the first n rows only")


class EasyVqaSource(Source):
    """The easy-VQA data set of the `easy-vqa` package; `validation` is the last images of its train part."""

    kind: Literal["easy_vqa"]
    split: Literal["train", "validation", "test"]
    validation_images: NonNegativeInt = Field(default=200, description="how many train images are held out as `validation`")
    task: Literal["vqa", "caption"] = Field(default="vqa", description="questions, or captions of what the questions reveal")
    instructions: str = Field(default="vqa", description="a prompt set of data_templates/instructions, or a file")


class LlavaSource(Source):
    """LLaVA JSON or JSONL: rows with `conversations` (from human | gpt) and `image`."""

    kind: Literal["llava"]
    path: str
    image_root: str | None = Field(default=None, description="where image paths start; the file's own folder where not given")


class MessagesSource(Source):
    """JSONL rows with `messages` (role, content) and `images`, as OpenAI and Hugging Face write them."""

    kind: Literal["messages"]
    path: str
    image_root: str | None = Field(default=None, description="where image paths start; the file's own folder where not given")


AnySource = Annotated[EasyVqaSource | LlavaSource | MessagesSource, Field(discriminator="kind")]


class Augment(Config):
    """Random changes of training images, drawn from (seed, epoch, sample id)."""

    flip: Fraction = Field(default=0.0, description="probability of a left-right mirror image")
    transpose: Fraction = Field(default=0.0, description="probability of exchanging height and width (square images only)")
    shift: Annotated[float, Field(ge=0, le=0.5)] = Field(default=0.0, description="largest shift, as a share of the side")


class DataSection(Config):
    """Where samples come from and how they become tokens."""

    train: list[AnySource] = Field(min_length=1)
    validation: list[AnySource] = Field(default=[], description="scored while training; chooses the best checkpoint")
    test: list[AnySource] = Field(default=[], description="scored once, by the finished model; never used to choose")
    template: str = Field(description="a chat format of data_templates/chat, or a file")
    system: str | None = Field(default=None, description="system text for conversations that bring none")
    max_length: PositiveInt = Field(default=2048, description="longest example in tokens, image slots included")
    overlong: Literal["fail", "drop"] = Field(default="fail", description="examples over max_length: stop, or drop and count")
    on_bad_row: Literal["fail", "skip"] = "fail"
    max_bad_rows: NonNegativeInt = Field(default=100, description="with skip: more than this many bad rows is an error")
    group: Literal["none", "image"] = Field(default="none", description="image: rows of one image are one unit of a batch")
    augment: Augment | None = None


# --- tuning ----------------------------------------------------------------------------------------------------------


class TuneRule(Config):
    """What happens to the parameters whose name matches; the first rule that matches wins."""

    match: str = Field(description="a glob over names: tower.*, connector.*, llm.*, llm.model.layers.0.*")
    how: Literal["frozen", "full", "lora"]
    learning_rate: PositiveFloat | None = Field(default=None, description="the train section's where not given")
    r: PositiveInt | None = Field(default=None, description="LoRA rank (lora only)")
    lora_alpha: PositiveFloat | None = Field(default=None, description="LoRA scale is lora_alpha / r (lora only)")
    lora_dropout: Fraction | None = Field(default=None, description="lora only")
    target_modules: list[str] | Literal["all-linear"] | None = Field(
        default=None, description="module names as in PEFT; all-linear leaves out the output head (lora only)"
    )


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


class TrainSection(Config):
    """The training loop."""

    epochs: PositiveFloat | None = Field(default=None, description="passes over the data; give this or steps")
    steps: PositiveInt | None = Field(default=None, description="optimizer steps; give this or epochs")
    batch_size: PositiveInt = Field(default=8, description="units (rows, or images with group: image) a device and micro-batch")
    gradient_accumulation: PositiveInt = 1
    learning_rate: PositiveFloat = 2e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: list[Fraction] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    schedule: Schedule = Schedule()
    max_grad_norm: PositiveFloat | None = 1.0
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    cache_features: bool = Field(default=True, description="compute a frozen tower's features once (not with augmentation)")
    log_every: PositiveInt = 10
    checkpoints: Checkpoints = Checkpoints()
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []


class EvaluateSection(Config):
    """Evaluation while training and after it."""

    every: PositiveInt | None = Field(default=None, description="optimizer steps; once an epoch where not given")
    limit: PositiveInt | None = Field(default=None, description="score the first n validation rows only")
    batch_size: PositiveInt = Field(default=64, description="rows")
    max_new_tokens: PositiveInt = 32
    num_beams: PositiveInt = 1
    samples: NonNegativeInt = Field(default=12, description="how many answers the report shows before and after training")


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
    output: str = Field(description="the run's folder")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: ModelSection
    data: DataSection
    tune: list[TuneRule] = Field(min_length=1)
    objective: Annotated[LanguageModeling | Contrastive, Field(discriminator="kind")] = LanguageModeling()
    train: TrainSection
    evaluate: EvaluateSection = EvaluateSection()
    stages: list[Stage] = []

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
