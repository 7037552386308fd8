"""Cost model of ring collectives: bytes that an optimizer step sends between processes, and time.

For S bytes on P processes, a ring's reduce-scatter or all-gather sends (P - 1) / P S from each
process, and an all-reduce is one of each (arXiv:1910.02054, section 7). The processes of a node are
neighbours in the ring, so the bytes that one process sends are also those that leave a node,
however many processes it has. Links inside a node are assumed to be faster.

| stage | sent for G bytes of gradients, W of weights, A micro-batches, in units of (P - 1) / P |
|---|---|
| 0 (DDP) | 2 G: the gradients' all-reduce, once a step |
| 1 | G + G: gradients reduced once, the trained weights gathered after the step |
| 2 | A G + G: gradients are sharded, so each micro-batch's are reduced |
| 3 | A G + A (W forward + W backward): every layer's weights are gathered where it runs |

Only trained weights have gradients, so G is small under LoRA. ZeRO-3 gathers the frozen weights all
the same.
"""

from __future__ import annotations

from dataclasses import dataclass

GIGABIT = 1e9 / 8
"""Bytes per gigabit."""

GOOD = 0.9
"""Efficiency for which the needed computing time of a step is given."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process sends in an optimizer step, by kind."""

    gradients: float
    updated: float
    forward: float
    backward: float

    @property
    def total(self) -> float:
        """The sum of all kinds."""
        return self.gradients + self.updated + self.forward + self.backward


@dataclass(frozen=True)
class Communication:
    """A step's traffic over links of `bandwidth` bytes a second, and the efficiency to expect.

    Efficiency is the share of its single-process speed that a process keeps.

    - `seconds`: on the link.
    - `good`: seconds of computing per step from which on the efficiency is `GOOD` without overlap.
    - `computing`: seconds of computing per step, None if the device's speed is not known.
    - `least`, `most`: efficiency with no overlap and with full overlap, None without `computing`.
    """

    traffic: Traffic
    nodes: int
    bandwidth: float
    seconds: float
    good: float
    computing: float | None
    least: float | None
    most: float | None


def traffic(
    trained: int, ran: int, returned: int, *, stage: int, processes: int, accumulation: int = 1
) -> Traffic:
    """The bytes that a process sends in a step.

    Args:
        trained: bytes of gradients.
        ran: bytes of weights that run in the forward pass.
        returned: bytes of weights that run in the backward pass.
        stage: of ZeRO, 0 for DDP.
        processes: number of processes.
        accumulation: micro-batches per step.
    """
    ring = (processes - 1) / processes
    micro = accumulation if stage >= 2 else 1
    return Traffic(
        gradients=ring * trained * (2 if stage == 0 else micro),
        updated=ring * trained if stage in (1, 2) else 0.0,
        forward=ring * ran * micro if stage == 3 else 0.0,
        backward=ring * returned * micro if stage == 3 else 0.0,
    )


def communication(
    sent: Traffic, flops: float, *, nodes: int, bandwidth: float, speed: float | None = None
) -> Communication:
    """The time of a step's traffic beside its computing.

    `bandwidth` is in bytes/s, `speed` in FLOP/s if it is known.
    """
    seconds = sent.total / bandwidth
    computing = flops / speed if speed else None
    least = most = None
    if computing:
        least = computing / (computing + seconds)
        most = computing / max(computing, seconds)
    return Communication(
        sent, nodes, bandwidth, seconds, seconds * GOOD / (1 - GOOD), computing, least, most
    )
