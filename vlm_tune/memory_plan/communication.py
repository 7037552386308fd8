"""What an optimizer step sends between processes, and how long that takes: a cost model of ring collectives.

Of S bytes on P processes, a ring's reduce-scatter or all-gather sends (P - 1) / P S from each, and an all-reduce is one of
each (arXiv:1910.02054, section 7). The processes of a node are neighbours in the ring, so what one process sends is also
what leaves a node, however many it has; the links inside a node are taken to be faster.

| stage | sent for G bytes of gradients, W of weights, A micro-batches, in units of (P - 1) / P |
|---|---|
| 0 (DDP) | 2 G: the gradients' all-reduce, once a step |
| 1 | G + G: gradients reduced once, the trained weights gathered after the step |
| 2 | A G + G: gradients are divided, so each micro-batch's are reduced |
| 3 | A G + A (W forward + W backward): every layer's weights are gathered where it runs |

Only what trains has gradients, so under LoRA G is small; ZeRO-3 gathers the frozen weights all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

GIGABIT = 1e9 / 8
"""Bytes of a gigabit."""

GOOD = 0.9
"""The efficiency that a step's computing time is given for."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process sends in an optimizer step, by what they are."""

    gradients: float
    updated: float
    forward: float
    backward: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.gradients + self.updated + self.forward + self.backward


@dataclass(frozen=True)
class Communication:
    """A step's traffic over links of `bandwidth` bytes a second, and the efficiency to expect.

    `seconds` are those on the link; `good` are the seconds of computing a step from which on efficiency is GOOD with nothing
    overlapped. Where a device's speed is known `computing` are a step's seconds, and the efficiency (the share of one
    process's speed that each keeps) lies between `least`, nothing overlapped, and `most`, all of it overlapped.
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
    """What a process sends a step; `trained` are bytes of gradients, `ran` of weights that run forward, `returned` backward."""
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
    """The time of a step's traffic at `bandwidth` bytes/s, beside `flops` computed at `speed` FLOP/s where that is known."""
    seconds = sent.total / bandwidth
    computing = flops / speed if speed else None
    least = most = None
    if computing:
        least = computing / (computing + seconds)
        most = computing / max(computing, seconds)
    return Communication(
        sent, nodes, bandwidth, seconds, seconds * GOOD / (1 - GOOD), computing, least, most
    )
