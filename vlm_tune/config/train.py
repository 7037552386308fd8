"""The recipe's `train` and `evaluate`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from vlm_tune.config.base import (
    Config,
    Decay,
    HomePath,
    Layers,
    LearningRate,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Processes,
)


class Schedule(Config):
    """Learning rate schedule: linear warm-up, then the course that `kind` names."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.03, description="share of all steps"
    )


class Checkpoints(Config):
    """When checkpoints are written and how many stay; the best and the last always stay."""

    every: PositiveInt | None = Field(
        default=None,
        description="optimizer steps between checkpoints; by default at each "
        "evaluation and at the end",
    )
    keep: PositiveInt = 2
    background: bool = Field(
        default=True,
        description="write in the background from a copy of the trained weights in CPU "
        "memory; false: training waits",
    )


class TrainSection(Config):
    """Settings of the training loop."""

    epochs: PositiveFloat | None = Field(
        default=None, description="passes over the data; give this or steps"
    )
    steps: PositiveInt | None = Field(
        default=None, description="optimizer steps; give this or epochs"
    )
    batch_size: PositiveInt = Field(
        default=8,
        description="units (rows, or images with group: image) per device and micro-batch",
    )
    batch_tokens: PositiveInt | None = Field(
        default=None, description="padded tokens per device and micro-batch, instead of batch_size"
    )
    gradient_accumulation: PositiveInt = 1
    learning_rate: LearningRate = 2e-4
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.0
    betas: list[Decay] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    schedule: Schedule = Schedule()
    max_grad_norm: PositiveFloat | None = 1.0
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    deterministic: bool = Field(
        default=False,
        description="use only deterministic operations, so that a resumed run equals an "
        "uninterrupted one bit for bit on a GPU too; slower; a CPU needs it not",
    )
    gradient_checkpointing: bool = False
    compile: Literal["auto"] | bool = Field(
        default="auto",
        description="compile the LLM's blocks; auto: from 50 million parameters and 50 steps "
        "(or 2,000 scored rows)",
    )
    kernels: Literal["auto", "reference", "emulate"] = Field(
        default="auto",
        description="what computes in bf16 on a CPU; auto: the best for it, reference: plain "
        "torch, emulate: the kernels with emulated instructions; VLM_TUNE_KERNELS overrides it",
    )
    cache_features: Literal["auto"] | bool = Field(
        default="auto",
        description="compute a frozen tower's features once (not with augmentation); auto: where "
        "an estimate of work saved and disk space says that it pays",
    )
    loader_workers: Literal["auto"] | Processes = Field(
        default="auto",
        description="processes of each rank that decode images and prepare batches ahead; auto: "
        "none on a CPU, on a GPU up to 8, by the cores that a rank has",
    )
    loader_start: Literal["fork", "forkserver"] = Field(
        default="fork",
        description="how those processes start; fork: as copies of the training process, at once; "
        "forkserver: from a process that holds no data and never saw a GPU, seconds later",
    )
    log_every: PositiveInt = 10
    checkpoints: Checkpoints = Checkpoints()
    max_nonfinite: PositiveInt = Field(
        default=3,
        description="stop after this many consecutive steps with non-finite loss or gradient;"
        " their updates are skipped",
    )
    timeout: Annotated[float, Field(gt=0, le=1e7)] = Field(
        default=1800.0, description="seconds to wait for other processes before stopping"
    )
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(default=[])


METRICS = (
    "exact_match",
    "vqa_exact_match",
    "vqa_accuracy",
    "relaxed_accuracy",
    "anls",
    "choice_letter",
    "choice_text",
    "balanced_accuracy",
    "precision_macro",
    "recall_macro",
    "f1_macro",
    "precision_micro",
    "recall_micro",
    "f1_micro",
    "bleu",
    "chrf",
    "rouge_l",
    "cider",
    "box_iou",
    "box_accuracy",
    "point_in_box",
    "point_accuracy",
    "perplexity",
    "text_recall_1",
    "text_recall_5",
    "text_recall_10",
    "image_recall_1",
    "image_recall_5",
    "image_recall_10",
)
"""The metrics that `evaluate.metrics` names; another name is a user's `module:function`."""

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""The name of a function of a user's own."""

REWARDS = (
    "exact_match",
    "vqa_exact_match",
    "vqa_accuracy",
    "relaxed_accuracy",
    "anls",
    "choice_letter",
    "choice_text",
    "bleu",
    "chrf",
    "rouge_l",
    "box_iou",
    "box_accuracy",
    "point_in_box",
    "point_accuracy",
)
"""The metrics that score one answer by itself, which `objective.reward_funcs` names."""

LOSS = "loss"
"""What `evaluate.best` names besides metrics: the loss of the reference answers."""

Answering = Literal["generate", "likelihood"]
"""Ways to answer rows that are scored."""
Baseline = Literal["majority", "same_question", "mean_box", "nearest", "probe", "blind"]


def file_name(name: str) -> str:
    """The name of a task, of which files are named. Raises `ValueError` for other characters."""
    if re.fullmatch(r"[A-Za-z0-9_.-]+", name) is None:
        raise ValueError("a name may only contain letters, digits, _, . and -")
    return name


class EvaluateSection(Config):
    """Settings of the evaluation during training and after it."""

    every: PositiveInt | None = Field(
        default=None, description="optimizer steps between evaluations; once per epoch by default"
    )
    limit: PositiveInt | None = Field(
        default=None, description="score only the first n validation rows"
    )
    test_limit: PositiveInt | None = Field(
        default=None, description="score only the first n test rows"
    )
    batch_size: PositiveInt = Field(default=64, description="rows scored together")
    max_new_tokens: PositiveInt = 32
    num_beams: Layers = 1
    answering: Answering = Field(
        default="generate",
        description="likelihood: rows with choices (multiple choice, classes) are answered by the "
        "choice that the model finds likeliest, and nothing else can be answered",
    )
    metrics: Annotated[list[str], Field(min_length=1)] | None = Field(
        default=None,
        description="what answers are scored by, as [exact_match, bleu]; a function of your own is "
        "my_module:score; by default what fits the form of the rows",
    )
    best: str | None = Field(
        default=None,
        description="the metric, one of metrics, or loss, whose best validation score chooses the "
        "checkpoint that a stage ends with; by default the first of metrics, or what fits the form",
    )
    baselines: Literal["auto"] | list[Baseline] = Field(
        default="auto",
        description="what the score is compared with: answers without training; auto: those that "
        "are cheap, [] none",
    )
    also: dict[Annotated[str, AfterValidator(file_name)], HomePath] = Field(
        default={},
        description="files of rows of other tasks, by a name each, that are scored before and "
        "after training: how much the model forgets",
    )
    samples: NonNegativeInt = Field(
        default=12, description="number of answers in the report before and after training"
    )
