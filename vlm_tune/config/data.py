"""The recipe's `data`: sources, the processing of their rows, and batching."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vlm_tune.config.base import (
    Config,
    Fraction,
    HomePath,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Processes,
)


class Source(Config):
    """Options shared by all sources.

    Rows are counted in units: a unit is a row, or an image with `group: image`.
    """

    limit: PositiveInt | None = Field(default=None, description="use only the first n rows")
    weight: PositiveFloat | None = Field(
        default=None, description="share of each epoch, relative to the other sources"
    )
    count: PositiveInt | None = Field(
        default=None, description="units per epoch; all if neither count nor weight is set"
    )
    loss_weight: PositiveFloat | None = Field(
        default=None, description="factor of the losses of its rows; 1 by default"
    )
    task_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] | None = Field(
        default=None,
        description="the task of its rows, by which scores are listed; the source's name by "
        "default",
    )
    objective: Literal["language_modeling", "contrastive", "matching"] | None = Field(
        default=None,
        description="which objective of a list its rows train, where these read other rows",
    )
    template: HomePath | None = Field(
        default=None, description="a chat format; data.template by default"
    )
    system: str | None = Field(
        default=None,
        description="system text for conversations without one; data.system by default",
    )
    enable_thinking: bool | None = Field(
        default=None,
        description="whether answers have reasoning; data.enable_thinking by default",
    )


SHARES = {"weight", "count", "loss_weight", "task_name", "objective"}
"""Options of a source that say how its rows are used, and change none of them."""

SOURCE_NAME = Field(
    default=None,
    description="name of the source in scores; the file's or folder's name by default",
)


class EasyVqaSource(Source):
    """The easy-VQA data set of the `easy-vqa` package.

    Its `validation` part is the last images of the train part.
    """

    kind: Literal["easy_vqa"]
    name: str | None = SOURCE_NAME
    split: Literal["train", "validation", "test"]
    validation_images: NonNegativeInt = Field(
        default=200, description="number of train images held out as `validation`"
    )
    task: Literal["vqa", "caption", "match", "preference", "grounding"] = Field(
        default="vqa",
        description="questions, captions built from the questions and answers, whether such a "
        "caption matches, questions with the answer as chosen and another of its kind as "
        "rejected, or where the shape is, as its box",
    )
    categories: Annotated[list[Literal["yes/no", "color", "shape"]], Field(min_length=1)] | None = (
        Field(default=None, description="use only rows of these categories")
    )
    instructions: HomePath = Field(
        default="vqa", description="an instruction set of data_templates/instructions, or a file"
    )


Form = Literal[
    "llava",
    "sharegpt",
    "messages",
    "prompt_completion",
    "preference",
    "unpaired_preference",
    "alpaca",
    "cauldron",
    "vqa",
    "multiple_choice",
    "caption",
    "match",
    "classify",
    "retrieval",
    "ocr",
    "translate",
    "grounding",
]
"""Layouts of rows, independent of the file format."""


class RowsSource(Source):
    """Options shared by all sources of rows: files, data sets and tar shards."""

    form: Form | Literal["auto"] = Field(
        default="auto",
        description="the form of the rows; by default detected from the first rows and reported",
    )
    columns: dict[str, str] = Field(
        default={}, description="map field names to the rows' own, e.g. {question: query}"
    )
    image_root: str | None = Field(
        default=None,
        description="folder that image paths are relative to; the file's folder by default",
    )
    instructions: HomePath | None = Field(
        default=None,
        description=("an instruction set for task rows; the task's default set if not given"),
    )
    ignore: list[str] = Field(
        default=[],
        description="fields to ignore; meaningful fields that the form does not read are "
        "otherwise an error",
    )
    null_values: list[str] | None = Field(
        default=None,
        description="texts that mean a missing value; for CSV and TSV by default empty cells,"
        " nan, null and the like",
    )
    booleans: Annotated[list[str], Field(min_length=2, max_length=2)] = Field(
        default=["no", "yes"], description="the texts of false and true in the fields of task rows"
    )
    answer_is: Literal["auto", "index", "index_from_1", "letter", "text"] = Field(
        default="auto",
        description="how an answer refers to one of the choices; auto rejects ambiguous rows",
    )
    shuffle_choices: bool = Field(
        default=False,
        description="shuffle the choices of each row by seed and row id",
    )
    box_format: Literal["xyxy", "xywh"] = Field(
        default="xyxy", description="boxes as two corners, or as a corner, width and height (COCO)"
    )
    box_unit: Literal["pixels", "norm1", "norm1000"] = Field(
        default="pixels",
        description="coordinates of boxes and points: pixels of the original image, 0 to 1, or "
        "0 to 1000",
    )
    shots: Annotated[int, Field(ge=0, le=16)] = Field(
        default=0, description="few-shot examples with their images before each question"
    )
    video_frames: PositiveInt = Field(
        default=8, description="frames sampled from a video, evenly spaced"
    )
    video_fps: PositiveFloat | None = Field(
        default=None,
        description="frame rate of videos stored as folders of frames",
    )


class FileSource(RowsSource):
    """Rows of JSON, JSONL, CSV, TSV, Parquet or Arrow files."""

    kind: Literal["file"]
    name: str | None = SOURCE_NAME
    path: str = Field(description="a file or a pattern, e.g. data/*.parquet")


class DatasetSource(RowsSource):
    """A data set of the datasets library.

    `name` is a hub name, or a folder that `save_to_disk` or `push_to_hub` wrote.
    """

    kind: Literal["dataset"]
    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = Field(default=None, description="a commit of the data set on the Hub")


class WebDatasetSource(RowsSource):
    """Tar shards in which files of the same stem (0001.jpg, 0001.json) form one row."""

    kind: Literal["webdataset"]
    name: str | None = SOURCE_NAME
    path: str = Field(description="a shard or a pattern, e.g. shards/*.tar")


class FolderSource(Source):
    """Images in one folder per class; the folder's name is the answer."""

    kind: Literal["folder"]
    name: str | None = SOURCE_NAME
    path: str
    instructions: HomePath = Field(
        default="classify",
        description=("an instruction set of data_templates/instructions, or a file"),
    )


AnySource = Annotated[
    EasyVqaSource | FileSource | DatasetSource | WebDatasetSource | FolderSource,
    Field(discriminator="kind"),
]


class RandAugment(Config):
    """`ops` random changes of strength `magnitude` (0 to 30), as in torchvision's RandAugment."""

    ops: PositiveInt = 2
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9


class Augment(Config):
    """Random changes of training images, drawn from (seed, epoch, sample id)."""

    crop: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="smallest share of the area that a random crop keeps"
    )
    zoom_out: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="smallest share of the sides to which the image shrinks, on its border's "
        "median colour",
    )
    flip: Fraction = Field(default=0.0, description="probability of a left-right mirror image")
    transpose: Fraction = Field(
        default=0.0, description="probability of exchanging height and width (square images only)"
    )
    shift: Annotated[float, Field(ge=0, le=0.5)] = Field(
        default=0.0, description="largest shift, as a share of the side"
    )
    rotation: Annotated[float, Field(ge=0, le=180)] = Field(
        default=0.0, description="largest turn, in degrees"
    )
    colour: Fraction = Field(
        default=0.0, description="largest change of brightness, contrast and saturation, as a share"
    )
    hue: Annotated[float, Field(ge=0, le=0.5)] = Field(
        default=0.0, description="largest turn of the hue, as a share of the circle"
    )
    grey: Fraction = Field(default=0.0, description="probability of an image without colours")
    noise: Fraction = Field(
        default=0.0, description="standard deviation of added Gaussian noise, as a share of white"
    )
    rand_augment: RandAugment | None = None


class Clean(Config):
    """Rules that leave rows out before training; the rows left out are counted."""

    duplicates: Literal["keep", "bytes", "perceptual"] = Field(
        default="keep",
        description="rows of equal text whose images are equal byte by byte, or look alike",
    )
    min_side: PositiveInt | None = Field(
        default=None, description="smallest side of an image, in pixels"
    )
    min_chars: PositiveInt | None = Field(
        default=None, description="shortest text of a row's turns together, in characters"
    )
    max_chars: PositiveInt | None = None
    languages: list[str] = Field(
        default=[],
        description="ISO 639-1 codes that a row's text may be in (needs the `language` extra)",
    )


class Split(Config):
    """Shares of the train sources to hold out; rows that share an image stay together."""

    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    test: Annotated[float, Field(ge=0, lt=1)] = 0.0
    stratify: bool = Field(default=False, description="keep the shares within each category")


class Mixture(Config):
    """Shares of an epoch by the sizes of the sources, for sources without a count."""

    temperature: Annotated[float, Field(ge=1, le=1e6)] = Field(
        description="a source of n units has a share in proportion to n ** (1 / temperature); 1: "
        "by size, higher: more even"
    )


class DataSection(Config):
    """Sources of samples, and how rows become tokens and batches."""

    train: list[AnySource] = Field(min_length=1)
    validation: list[AnySource] = Field(
        default=[], description="scored during training; selects the best checkpoint"
    )
    test: list[AnySource] = Field(
        default=[], description="scored once with the finished model; never used for selection"
    )
    split: Split | None = Field(
        default=None, description="hold out validation and test from the train sources"
    )
    template: HomePath = Field(description="a chat format of data_templates/chat, or a file")
    system: str | None = Field(
        default=None, description="system text for conversations without one"
    )
    enable_thinking: bool | None = Field(
        default=None,
        description="whether answers have reasoning, for chat formats with this switch; by default "
        "as the format has it, and without reasoning for a checkpoint's own template",
    )
    max_length: PositiveInt = Field(
        default=2048, description="maximum tokens of an example, including image slots"
    )
    overlong: Literal["fail", "drop", "split", "trim"] = Field(
        default="fail",
        description="examples over max_length: stop, skip, split between turns, or truncate "
        "the question's text",
    )
    on_bad_row: Literal["fail", "skip", "quarantine"] = Field(
        default="fail",
        description="unusable rows: stop, skip, or skip and write them to quarantine.jsonl",
    )
    max_bad_rows: NonNegativeInt = Field(
        default=100,
        description="with skip and quarantine: fail if there are more bad rows than this",
    )
    clean: Clean = Clean()
    group: Literal["none", "image"] = Field(
        default="none", description="image: the rows of one image form one unit of a batch"
    )
    packing: bool = Field(
        default=False,
        description="pack several samples into a row of a batch; they don't attend to each other",
    )
    row_length: PositiveInt = Field(
        default=1024, description="maximum tokens of a grouped or packed row"
    )
    mixture: Mixture | None = None
    epoch_size: PositiveInt | None = Field(
        default=None, description="units per epoch when sources have weights, or with a mixture"
    )
    streaming: bool = Field(
        default=False,
        description="read, check and tokenize during training; for data too large to prepare first",
    )
    shuffle_buffer: PositiveInt = Field(
        default=10_000, description="size of the shuffle buffer of a streamed epoch, in rows"
    )
    own_shards: bool = Field(
        default=False,
        description="with streaming: each process reads only its own shards or ranges of the "
        "files; for many nodes",
    )
    workers: Processes | None = Field(
        default=None, description="processes that prepare the data; one per core by default"
    )
    augment: Augment | None = None
