"""What a plan says: bytes by cause, sizes and steps of each stage, and changes that need less."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from vlm_tune.memory_plan.batch_stats import Work
from vlm_tune.memory_plan.communication import Communication
from vlm_tune.memory_plan.heap import Allocator
from vlm_tune.memory_plan.machine import Machine
from vlm_tune.model.tuning import TuneRow

Offload = Literal["none", "optimizer", "all"]
"""What DeepSpeed keeps in the machine's memory: nothing, optimizer states, or those and the weights."""


@dataclass(frozen=True)
class PartSize:
    """Numbers of parameters of one part, LoRA's among them, and the bytes that its weights take."""

    part: str
    total: int
    trained: int
    adapters: int
    bytes: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at its peak, by cause.

    `exchange` is what joins the processes: gradient buckets, under ZeRO-3 also the layers that are gathered. On a CPU
    `holes` are what lies idle between a step's storages, and `kernels` what oneDNN keeps of compiled ones.
    """

    frozen: int
    trained: int
    adapters: int
    optimizer: int
    gradients: int
    activations: int
    logits: int
    exchange: int
    holes: int
    kernels: int
    base: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class StagePlan:
    """One stage: sizes, memory, and FLOPs of an optimizer step of one process.

    `loading` is the peak before the first step, where weights are made in fp32 or the tower runs for the last time;
    `source` says where lengths are from; `host` are the bytes offloaded to the machine's memory; `communication` is None
    for one process; `steps` are all optimizer steps, None where the data is not known.
    """

    name: str
    parts: list[PartSize]
    tuning: list[TuneRow]
    peak: Work
    mean: Work
    source: str
    memory: Memory
    loading: int
    flops: float
    feature_cache: int
    cached: bool
    host: int
    communication: Communication | None
    steps: int | None

    @property
    def needed(self) -> int:
        """Bytes at the stage's peak."""
        return max(self.memory.total, self.loading)


@dataclass(frozen=True)
class Advice:
    """A change that lessens memory, as overrides of the recipe or a ZeRO stage, and what the run then needs."""

    text: str
    changes: list[str]
    zero: int
    needed: int


@dataclass(frozen=True)
class Plan:
    """What a run needs on each of `processes` devices; `fits` is None where no memory was named.

    `allocator` is what a CPU's holes are counted for; `machine` is this one, None where the plan is for another.
    """

    name: str
    device: str
    precision: str
    quantize: str | None
    processes: int
    zero: int
    nodes: int
    offload: Offload
    gpu_memory: int | None
    allocator: Allocator | None
    stages: list[StagePlan]
    seconds: float
    machine: Machine | None = None
    advice: list[Advice] = field(default_factory=list)

    @property
    def needed(self) -> int:
        """Bytes at the peak of the stage that needs most."""
        return max(stage.needed for stage in self.stages)

    @property
    def fits(self) -> bool | None:
        """Whether that is within the memory named."""
        return None if self.gpu_memory is None else self.needed <= self.gpu_memory

    def time(self, stage: StagePlan) -> tuple[float, float] | None:
        """The least and the most seconds that a stage's steps are expected to take here; None where that is not known."""
        if self.machine is None or stage.steps is None:
            return None
        return self.machine.seconds(stage.flops * stage.steps)

    def summary(self) -> dict[str, Any]:
        """The plan as JSON."""
        stages = [
            asdict(stage) | {"needed": stage.needed, "time": self.time(stage)}
            for stage in self.stages
        ]
        return asdict(self) | {"needed": self.needed, "fits": self.fits, "stages": stages}
