"""Memory of one data-parallel process under each stage of DeepSpeed's ZeRO (arXiv:1910.02054).

For N parameters trained in fp32 by AdamW on P processes, and F bytes of frozen weights, the bytes
of one process are:

| stage | frozen | trained | gradients | optimizer |
|---|---|---|---|---|
| 0 (DDP) | F | 4 N | 4 N | 8 N |
| 1 | F | 4 N | 4 N | 12 N / P, with DeepSpeed's own fp32 copy of the weights |
| 2 | F | 4 N | 4 N / P | 12 N / P |
| 3 | F / P | 4 N / P | 4 N / P | 12 N / P, the copy is there too (measured: dev/log.md) |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BUCKET = 50_000_000 * 4
"""Bytes of fp32 gradients that DeepSpeed exchanges at once, unless the recipe says otherwise.
DeepSpeed's own default is ten times that."""

GATHERED = 2
"""Layers that ZeRO-3 has gathered at once: the one that runs, and the one being prefetched."""


@dataclass(frozen=True)
class Held:
    """Bytes before sharding: frozen weights, trained weights, adapters, and the largest module."""

    frozen: int
    trained: int
    adapters: int
    largest: int


@dataclass(frozen=True)
class Shares:
    """One process's bytes on its device, and `host` in the host's memory if parts are offloaded.

    `gradients` are those that exist at the optimizer's step, `exchange` the communication buffers.
    """

    frozen: int
    trained: int
    adapters: int
    gradients: int
    optimizer: int
    exchange: int
    host: int


def zero_memory(
    weights: Held,
    numbers: int,
    *,
    stage: int,
    processes: int,
    accumulating: bool = False,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
) -> Shares:
    """The memory of one of `processes` under ZeRO `stage`.

    DDP's gradients lie in its communication buckets, except in the first step of several
    micro-batches (`accumulating`).

    Args:
        weights: bytes of the model's weights.
        numbers: trained parameters.
        stage: of ZeRO, 0 for DDP.
        processes: number of data-parallel processes.
        accumulating: whether a step has several micro-batches.
        offload_optimizer: whether optimizer states are on the host.
        offload_parameters: whether weights are on the host too.

    Raises:
        ValueError: the stage does not have this offload.
    """
    if (offload_optimizer and stage == 0) or (offload_parameters and stage < 3):
        raise ValueError(
            f"ZeRO-{stage} offloads no "
            f"{'optimizer' if offload_optimizer and stage == 0 else 'parameters'}"
        )

    def share(size: int, first: int) -> int:
        return math.ceil(size / processes) if stage >= first else size

    frozen, trained, adapters = (
        share(size, 3) for size in (weights.frozen, weights.trained, weights.adapters)
    )
    gradients = share(4 * numbers, 2)
    optimizer = share((12 if stage else 8) * numbers, 1)
    exchange = 0
    if processes > 1:
        exchange = 4 * numbers * accumulating if stage == 0 else min(4 * numbers, BUCKET)
    if stage == 3 and (processes > 1 or offload_parameters):
        exchange += GATHERED * weights.largest
    host = 0
    if offload_optimizer:
        # The step runs on the host, so its gradients are brought there.
        host = optimizer + math.ceil(4 * numbers / processes)
        optimizer = 0
    if offload_parameters:
        host += frozen + trained + adapters
        frozen = trained = adapters = 0
    return Shares(frozen, trained, adapters, gradients, optimizer, exchange, host)
