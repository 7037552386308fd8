"""The machine that a recipe is written for: its GPU or CPU, its memory, and the model hub."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import psutil
import torch

from vlm_tune.memory_plan.machine import measure
from vlm_tune.model.hub import hub_answers
from vlm_tune.precision import DTYPES
from vlm_tune.resources import usable_cores
from vlm_tune.system import cpu_model, gpu

GPU_SHARE = 0.92
"""Share of a GPU's memory that a plan may take: batches of different shapes leave holes."""
CPU_SHARE = 0.8
"""Share of the free memory that a plan may take on a CPU."""
BF16_CAPABILITY = 8.0
"""CUDA capability from which on GPUs multiply matrices in bf16."""


@dataclass(frozen=True)
class Machine:
    """The device that trains, and the bytes that a run may take on it.

    `capability` is a GPU's CUDA capability, None for a CPU. `hub` says whether the model hub can be
    reached.
    """

    name: str
    capability: float | None
    memory: int
    cores: int
    hub: bool

    @property
    def gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.capability is not None

    @property
    def description(self) -> str:
        """The device in words."""
        reachable = "can be reached" if self.hub else "can't be reached"
        return (
            f"{self.name}, {self.memory / 1e9:.1f} GB of memory to use, {self.cores} cores; the "
            f"model hub {reachable}"
        )

    @cached_property
    def precision(self) -> tuple[str, str]:
        """The precision that a pretrained model trains in here, and the reason."""
        if self.capability is not None:
            if self.capability >= BF16_CAPABILITY:
                return "bf16", "this GPU multiplies matrices in bf16"
            return "fp16", f"this GPU is of capability {self.capability}, too old for bf16"
        rates = {name: measure(name, DTYPES[name]).rate for name in ("bf16", "fp32")}
        fast = max(rates, key=lambda name: rates[name])
        slow = "fp32" if fast == "bf16" else "bf16"
        ratio = rates[fast] / rates[slow]
        return fast, f"this CPU multiplies matrices {ratio:.1f} times as fast as in {slow}"


def this_machine() -> Machine:
    """Looks at the first GPU, or at the CPU where there is none."""
    cores = usable_cores()
    if torch.cuda.is_available():
        facts = gpu(0)
        memory = int(GPU_SHARE * torch.cuda.get_device_properties(0).total_memory)
        return Machine(facts["name"], float(facts["capability"]), memory, cores, hub_answers())
    memory = int(CPU_SHARE * psutil.virtual_memory().available)
    return Machine(cpu_model(), None, memory, cores, hub_answers())
