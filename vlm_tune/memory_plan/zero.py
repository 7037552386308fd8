"""What one of several data-parallel processes holds under each stage of DeepSpeed's ZeRO (arXiv:1910.02054).

Numbers train in fp32, N of them on P processes, under AdamW. Bytes a process holds of them and of the frozen weights F:

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
"""Bytes of fp32 gradients that DeepSpeed exchanges at once, unless the recipe says otherwise; its own default is ten times that."""

GATHERED = 2
"""Layers of ZeRO-3 that are whole at once: the one that runs, and the one that is fetched meanwhile."""


@dataclass(frozen=True)
class Held:
    """Bytes before they are divided: frozen weights, trained ones, adapters, and the largest module's own weights."""

    frozen: int
    trained: int
    adapters: int
    largest: int


@dataclass(frozen=True)
class Shares:
    """One process's bytes: on its device, and `host` in the machine's memory where parts are offloaded.

    `gradients` are those that are there when the optimizer steps; `exchange` is what joins the processes.
    """

    frozen: int
    trained: int
    adapters: int
    gradients: int
    optimizer: int
    exchange: int
    host: int


def zero_memory(
    held: Held,
    numbers: int,
    *,
    stage: int,
    processes: int,
    accumulating: bool = False,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
) -> Shares:
    """The share of one of `processes` under ZeRO `stage`, of a model that holds `held`, of which `numbers` train.

    DDP's gradients lie in what it sends, but for those of the first step of several micro-batches (`accumulating`).

    Raises `ValueError` for an offload that the stage does not have.
    """
    if (offload_optimizer and stage == 0) or (offload_parameters and stage < 3):
        raise ValueError(
            f"ZeRO-{stage} offloads no "
            f"{'optimizer' if offload_optimizer and stage == 0 else 'parameters'}"
        )

    def share(size: int, first: int) -> int:
        return math.ceil(size / processes) if stage >= first else size

    frozen, trained, adapters = (
        share(size, 3) for size in (held.frozen, held.trained, held.adapters)
    )
    gradients = share(4 * numbers, 2)
    optimizer = share((12 if stage else 8) * numbers, 1)
    exchange = 0
    if processes > 1:
        exchange = 4 * numbers * accumulating if stage == 0 else min(4 * numbers, BUCKET)
    if stage == 3 and (processes > 1 or offload_parameters):
        exchange += GATHERED * held.largest
    host = 0
    if offload_optimizer:
        # The step runs on the host, so its gradients are brought there.
        host = optimizer + math.ceil(4 * numbers / processes)
        optimizer = 0
    if offload_parameters:
        host += frozen + trained + adapters
        frozen = trained = adapters = 0
    return Shares(frozen, trained, adapters, gradients, optimizer, exchange, host)
