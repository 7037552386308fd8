"""The recipe's `engine`: how several processes train together."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from vlm_tune.config.base import Config


class AutoEngine(Config):
    """Follows the launch: one process alone, several by DDP, or as an accelerate config says."""

    kind: Literal["auto"] = "auto"


class DdpEngine(Config):
    """Distributed data parallel: every process holds the whole model; gradients are averaged."""

    kind: Literal["ddp"]


class DeepSpeedEngine(Config):
    """DeepSpeed's ZeRO: optimizer states, gradients and weights can be sharded over processes."""

    kind: Literal["deepspeed"]
    stage: Annotated[int, Field(ge=0, le=3)] = Field(
        default=2,
        description="what is sharded over the processes: 1 optimizer states, 2 also "
        "gradients, 3 also weights",
    )
    offload: list[Literal["optimizer", "parameters"]] = Field(
        default=[],
        description="what to keep in CPU memory: optimizer states (stages 1 to 3), weights "
        "(stage 3)",
    )
    config: dict[str, Any] = Field(
        default={},
        description="further keys of a DeepSpeed configuration, e.g. {zero_optimization: {...}}",
    )


class FsdpEngine(Config):
    """PyTorch's fully sharded data parallel (FSDP2)."""

    kind: Literal["fsdp"]
    offload: bool = Field(
        default=False, description="keep weights and optimizer states in CPU memory"
    )


AnyEngine = AutoEngine | DdpEngine | DeepSpeedEngine | FsdpEngine


def shards(section: AnyEngine) -> bool:
    """Whether an engine's processes hold only shards of the weights."""
    return isinstance(section, FsdpEngine) or (
        isinstance(section, DeepSpeedEngine) and section.stage == 3
    )
