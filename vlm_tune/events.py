"""The events of runs, checks and evaluations: what is shown, and what a run's log.jsonl holds.

A log line is `Event.line()` and the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self


@dataclass(frozen=True)
class Event:
    """Something that happened; a subclass says what."""

    kind: ClassVar[str]
    """Its name in the log."""

    def line(self) -> dict[str, Any]:
        """The event as JSON; a field with a default is left out where it has that value."""
        return {"event": self.kind} | {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if getattr(self, each.name) != each.default
        }


@dataclass(frozen=True)
class StageEvent(Event):
    """An event that may belong to a stage of a run, by its number from 0 and its name."""

    stage: int | None = field(default=None, kw_only=True)
    name: str | None = field(default=None, kw_only=True)

    def of_stage(self, stage: int, name: str) -> Self:
        """The event as one of a stage."""
        return replace(self, stage=stage, name=name)

    def line(self) -> dict[str, Any]:
        """The event as JSON, its stage last."""
        values = super().line()
        place = {key: values.pop(key) for key in ("stage", "name") if key in values}
        return values | place


Report = Callable[[Event], None]
"""Takes one event, to be logged, shown and tracked."""
StageReport = Callable[[StageEvent], None]
"""Takes one event of a stage."""


@dataclass(frozen=True)
class Environment(Event):
    """The environment that a run's numbers depend on, as values by name."""

    kind = "environment"
    values: Mapping[str, Any]
    kernels_reason: str
    """What computes in bf16 on the CPU, and why."""

    def line(self) -> dict[str, Any]:
        """The event as JSON, without a level for the values."""
        return {"event": self.kind, **self.values, "kernels_reason": self.kernels_reason}


@dataclass(frozen=True)
class LoadedModel(Event):
    """The model that a command uses."""

    kind = "model"
    folder: str
    about: str


@dataclass(frozen=True)
class Note(StageEvent):
    """A message for the user, about a step where it belongs to one."""

    kind = "note"
    text: str
    step: int | None = None


@dataclass(frozen=True)
class Preparing(StageEvent):
    """Rows of a part that are prepared so far."""

    kind = "preparing"
    part: str
    rows: int


@dataclass(frozen=True)
class Features(StageEvent):
    """Images, tiles or windows of audio whose tower features are computed so far."""

    kind = "features"
    done: int
    of: int


@dataclass(frozen=True)
class Scoring(StageEvent):
    """Questions that are answered so far."""

    kind = "scoring"
    done: int
    of: int


@dataclass(frozen=True)
class ValidationLoss(StageEvent):
    """Rows of the validation part whose loss is computed so far, where no answer is generated."""

    kind = "validation_loss"
    done: int
    of: int


@dataclass(frozen=True)
class Tuning(Event):
    """The tuning table of a stage, one mapping per rule."""

    kind = "tuning"
    stage: int
    name: str
    rows: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class StageStart(Event):
    """A stage before its first step; a stream's rows are not counted.

    `frames` are distinct frames of videos, `clips` distinct clips of audio.
    """

    kind = "stage"
    steps: int
    from_step: int
    questions: int | None = None
    images: int | None = None
    frames: int = 0
    clips: int = 0
    left_out: dict[str, int] | None = None
    streaming: bool = False
    stage: int
    name: str


@dataclass(frozen=True)
class Acceleration(StageEvent):
    """The parts of the language model that train by kernels, and why others do not.

    `replaced` counts modules by kind, `skipped` by kind and reason.
    """

    kind = "acceleration"
    text: str
    replaced: dict[str, int]
    skipped: dict[str, dict[str, int]]


@dataclass(frozen=True, kw_only=True)
class TrainSteps(StageEvent):
    """The mean loss and the throughput of the steps since the last such event.

    `of` is the number of all steps and `left` the seconds that those to come may take; `epoch` is
    None in a stream, and memory on a CPU. `metrics` are further means of the objective by name.
    """

    kind = "train"
    step: int
    of: int
    epoch: float | None = None
    loss: float
    questions_per_s: float
    tokens_per_s: float
    padding: float
    stall: float
    imbalance: float
    learning_rate: float
    gpu_memory_mb: int | None = None
    gpu_reserved_mb: int | None = None
    left: float
    metrics: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation(StageEvent):
    """The scores on the validation part after a step, as `evaluation.metrics.Scores`.

    `best_by` names the metric, or `loss`, that chooses the best checkpoint. An objective of
    preferences, which generates no answers, has no accuracy, no tokens and no groups.
    """

    kind = "evaluate"
    step: int
    accuracy: float | None
    n: int
    loss: float | None
    best_by: str = "exact_match"
    tokens: int | None = None
    by_category: dict[str, dict[str, Any]] | None = None
    by_source: dict[str, dict[str, Any]] | None = None
    metrics: dict[str, dict[str, Any]] | None = None
    skipped: dict[str, str] | None = None
    modality: str | None = None

    @property
    def figures(self) -> dict[str, float | None]:
        """Exact match and the other metrics by name; None for one that is not finite."""
        exact = {} if self.accuracy is None else {"exact_match": self.accuracy}
        return exact | {name: entry["value"] for name, entry in (self.metrics or {}).items()}

    @property
    def score(self) -> float | None:
        """The figure that chooses the best checkpoint; None where it is not known or finite."""
        return self.loss if self.best_by == "loss" else self.figures.get(self.best_by)


@dataclass(frozen=True)
class PeakMemory(Event):
    """The peak memory of the GPUs in a stage, in MB (10^6 bytes)."""

    kind = "memory"
    stage: int
    name: str
    gpu_memory_mb: int
    gpu_reserved_mb: int


@dataclass(frozen=True)
class TrialStart(Event):
    """A trial of a sweep before its run, by its number from 1, and its searched values."""

    kind = "trial"
    number: int
    of: int
    values: Mapping[str, Any]
    resumed: bool = False


@dataclass(frozen=True, kw_only=True)
class TrialEnd(Event):
    """A trial of a sweep after its run, and the best trial so far.

    `state` is complete, pruned or failed, the latter two for a `reason`. The score, of `metric`, is
    the best of the validation part, after the optimizer step `step`.
    """

    kind = "trial_end"
    number: int
    of: int
    state: str
    seconds: float
    metric: str | None = None
    score: float | None = None
    step: int | None = None
    reason: str = ""
    best: int | None = None
    best_score: float | None = None


@dataclass(frozen=True, kw_only=True)
class FinalScores(Event):
    """The scores of the finished model on the test part, as `evaluation.metrics.Scores`."""

    kind = "test"
    accuracy: float
    n: int
    loss: float | None
    tokens: int
    by_category: dict[str, dict[str, Any]]
    by_source: dict[str, dict[str, Any]]
    metrics: dict[str, dict[str, Any]] | None = None
    skipped: dict[str, str] | None = None
    classes: dict[str, Any] | None = None
    baselines: dict[str, dict[str, dict[str, Any]]] | None = None
    also: dict[str, dict[str, Any]] | None = None
    notes: list[str] | None = None
    modality: str = "image"
