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
        description="what the processes share out: 1 optimizer states, 2 gradients too, 3 weights "
        "too",
    )
    offload: list[Literal["optimizer", "parameters"]] = Field(
        default=[],
        description="what lies in the CPU's memory: optimizer states (stage 1 to 3), weights "
        "(stage 3)",
    )
    config: dict[str, Any] = Field(
        default={},
        description="more keys of a DeepSpeed configuration, as {zero_optimization: {...}}",
    )


class FsdpEngine(Config):
    """PyTorch's fully sharded data parallel (FSDP2)."""

    kind: Literal["fsdp"]
    offload: bool = Field(
        default=False, description="weights and optimizer states lie in the CPU's memory"
    )


AnyEngine = AutoEngine | DdpEngine | DeepSpeedEngine | FsdpEngine
