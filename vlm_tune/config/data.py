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

    limit: PositiveInt | None = Field(default=None, description="take the first n rows only")
    weight: PositiveFloat | None = Field(
        default=None, description="share of every epoch, relative to the other sources"
    )
    count: PositiveInt | None = Field(
        default=None, description="units of every epoch; all where neither is given"
    )
    template: HomePath | None = Field(
        default=None, description="a chat format; data.template where not given"
    )
    system: str | None = Field(
        default=None,
        description="system text for conversations that bring none; data.system where not given",
    )


SOURCE_NAME = Field(
    default=None,
    description="what scores call the source; the file's or folder's name where not given",
)


class EasyVqaSource(Source):
    """The easy-VQA data set of the `easy-vqa` package.

    Its `validation` part is the last images of the train part.
    """

    kind: Literal["easy_vqa"]
    name: str | None = SOURCE_NAME
    split: Literal["train", "validation", "test"]
    validation_images: NonNegativeInt = Field(
        default=200, description="how many train images are held out as `validation`"
    )
    task: Literal["vqa", "caption"] = Field(
        default="vqa", description="questions, or captions of what the questions reveal"
    )
    instructions: HomePath = Field(
        default="vqa", description="a prompt set of data_templates/instructions, or a file"
    )


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
"""Layouts of rows, independent of the file format."""


class RowsSource(Source):
    """Options shared by all sources of rows: files, data sets and tar shards."""

    form: Form | Literal["auto"] = Field(
        default="auto", description="what a row looks like; detected from the first rows and named"
    )
    columns: dict[str, str] = Field(
        default={}, description="our field names to the rows' own, as {question: query}"
    )
    image_root: str | None = Field(
        default=None, description="where image paths start; the file's own folder where not given"
    )
    instructions: HomePath | None = Field(
        default=None, description="a prompt set for plain task rows; the task's own where not given"
    )
    ignore: list[str] = Field(
        default=[],
        description="fields of the rows to pass over: those that carry meaning are refused where a "
        "form does not read them",
    )
    null_values: list[str] | None = Field(
        default=None,
        description="texts that are missing values; of CSV and TSV, where not given, empty cells, "
        "nan, null and their like",
    )
    booleans: Annotated[list[str], Field(min_length=2, max_length=2)] = Field(
        default=["no", "yes"], description="the texts of false and true in the fields of task rows"
    )
    answer_is: Literal["auto", "index", "index_from_1", "letter", "text"] = Field(
        default="auto",
        description="how an answer names one of the row's choices; auto refuses a row that can be "
        "read in two ways",
    )
    shuffle_choices: bool = Field(
        default=False,
        description="show each row's choices in an order drawn from the seed and the row's id",
    )
    shots: Annotated[int, Field(ge=0, le=16)] = Field(
        default=0, description="worked examples with their images before each question"
    )
    video_frames: PositiveInt = Field(
        default=8, description="frames taken of a video, evenly spaced"
    )
    video_fps: PositiveFloat | None = Field(
        default=None,
        description="of videos that are folders of frames; gives the frames their time",
    )


class FileSource(RowsSource):
    """Rows of JSON, JSONL, CSV, TSV, Parquet or Arrow files."""

    kind: Literal["file"]
    name: str | None = SOURCE_NAME
    path: str = Field(description="a file, or a pattern as data/*.parquet")


class DatasetSource(RowsSource):
    """A data set of the datasets library.

    `name` is a hub name, or a folder that `save_to_disk` or `push_to_hub` wrote.
    """

    kind: Literal["dataset"]
    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = Field(default=None, description="a commit of the hub's data set")


class WebDatasetSource(RowsSource):
    """Tar shards in which files of the same stem (0001.jpg, 0001.json) form one row."""

    kind: Literal["webdataset"]
    name: str | None = SOURCE_NAME
    path: str = Field(description="a shard, or a pattern as shards/*.tar")


class FolderSource(Source):
    """Images in one folder per class; the folder's name is the answer."""

    kind: Literal["folder"]
    name: str | None = SOURCE_NAME
    path: str
    instructions: HomePath = Field(
        default="classify", description="a prompt set of data_templates/instructions, or a file"
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
    stratify: bool = Field(default=False, description="the same shares within every category")


class DataSection(Config):
    """Sources of samples, and how rows become tokens and batches."""

    train: list[AnySource] = Field(min_length=1)
    validation: list[AnySource] = Field(
        default=[], description="scored while training; chooses the best checkpoint"
    )
    test: list[AnySource] = Field(
        default=[], description="scored once, by the finished model; never used to choose"
    )
    split: Split | None = Field(
        default=None, description="take validation and test from the train sources"
    )
    template: HomePath = Field(description="a chat format of data_templates/chat, or a file")
    system: str | None = Field(
        default=None, description="system text for conversations that bring none"
    )
    max_length: PositiveInt = Field(
        default=2048, description="longest example in tokens, image slots included"
    )
    overlong: Literal["fail", "drop", "split", "trim"] = Field(
        default="fail",
        description="examples over max_length: stop; leave out; split between turns; shorten the "
        "questions' text",
    )
    on_bad_row: Literal["fail", "skip", "quarantine"] = Field(
        default="fail",
        description="rows that can't be used: stop; leave out; leave out and write to "
        "quarantine.jsonl",
    )
    max_bad_rows: NonNegativeInt = Field(
        default=100, description="with skip and quarantine: more bad rows than this is an error"
    )
    clean: Clean = Clean()
    group: Literal["none", "image"] = Field(
        default="none", description="image: rows of one image are one unit of a batch"
    )
    packing: bool = Field(
        default=False,
        description="fill each row of a batch with several samples that don't see each other",
    )
    row_length: PositiveInt = Field(
        default=1024, description="longest row in tokens that grouping or packing makes"
    )
    epoch_size: PositiveInt | None = Field(
        default=None, description="units of an epoch when sources have weights"
    )
    streaming: bool = Field(
        default=False,
        description="read, check and tokenise while training; for more rows than can be prepared",
    )
    shuffle_buffer: PositiveInt = Field(
        default=10_000, description="rows that a streamed epoch is shuffled within"
    )
    own_shards: bool = Field(
        default=False,
        description="with streaming: each process reads its own shards or stretches of the files, "
        "not all; for many nodes",
    )
    workers: Processes | None = Field(
        default=None, description="processes that prepare; as many as cores where not given"
    )
    augment: Augment | None = None
