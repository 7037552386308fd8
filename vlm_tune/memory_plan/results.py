"""The parts of a plan: bytes by cause, sizes and steps of each stage, and advice."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from vlm_tune.memory_plan.batch_stats import Work
from vlm_tune.memory_plan.heap import Allocator
from vlm_tune.memory_plan.machine import Machine
from vlm_tune.model.optimizer_groups import TuneRow

Offload = Literal["none", "optimizer", "all"]
"""What DeepSpeed offloads to the host: nothing, optimizer states, or those and the weights."""


@dataclass(frozen=True)
class PartSize:
    """Parameter counts of one part, LoRA's included, and the bytes of its weights."""

    part: str
    total: int
    trained: int
    adapters: int
    bytes: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at its peak, by cause.

    - `exchange`: communication buffers: gradient buckets, under ZeRO-3 also gathered layers.
    - `collectives`: NCCL's own buffers, of several processes on GPUs.
    - `holes`: idle memory between a step's storages, rounding of their sizes included.
    - `workspaces`: memory that cuBLAS works in, on a GPU.
    - `kernels`: kernels that oneDNN has compiled, on a CPU.
    - `base`: memory that is taken before the run.
    """

    frozen: int
    trained: int
    adapters: int
    optimizer: int
    gradients: int
    activations: int
    logits: int
    exchange: int
    collectives: int
    holes: int
    workspaces: int
    kernels: int
    base: int

    @property
    def total(self) -> int:
        """The sum of all causes."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class StagePlan:
    """One stage: sizes, memory, and FLOPs of one process in an optimizer step.

    - `loading`: the peak before the first step, when weights are created in fp32 or the tower runs
      for the last time.
    - `source`: where lengths are from.
    - `feature_cache`: bytes on the disk, 0 if unknown; `cached` says whether there is a cache,
      `why_cached` the reason.
    - `host`: bytes offloaded to the host's memory.
    - `steps`: all optimizer steps, None if the data is not known.
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
    why_cached: str
    host: int
    steps: int | None

    @property
    def needed(self) -> int:
        """Bytes at the stage's peak."""
        return max(self.memory.total, self.loading)


@dataclass(frozen=True)
class Advice:
    """A change that reduces memory: recipe overrides, a ZeRO stage, and the bytes then needed."""

    text: str
    changes: list[str]
    zero: int
    needed: int


@dataclass(frozen=True)
class Plan:
    """The memory, FLOPs and time of a run, per device of `processes`.

    `allocator` is the one that a CPU's holes are computed for. `machine` is this machine, None if
    the plan is for another.
    """

    name: str
    device: str
    precision: str
    quantize: str | None
    processes: int
    zero: int
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
        """Whether the run fits into `gpu_memory`; None if that is not set."""
        return None if self.gpu_memory is None else self.needed <= self.gpu_memory

    def time(self, stage: StagePlan) -> tuple[float, float] | None:
        """The least and the most seconds expected for a stage on this machine; None if unknown."""
        if self.machine is None or stage.steps is None:
            return None
        return self.machine.seconds(stage.flops * stage.steps)

    def summary(self) -> dict[str, Any]:
        """The plan as a dict for JSON."""
        stages = [
            asdict(stage) | {"needed": stage.needed, "time": self.time(stage)}
            for stage in self.stages
        ]
        return asdict(self) | {"needed": self.needed, "fits": self.fits, "stages": stages}
