"""Exchanges between ranks once a step, over gloo, so that no GPU is synchronised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from vlm_tune.errors import TrainingError
from vlm_tune.train.checkpoint import CheckpointWriter
from vlm_tune.train.objectives import Counts
from vlm_tune.train.step_trace import DIGESTS


@dataclass(frozen=True)
class Meeting:
    """Totals over all ranks for the next step.

    Attributes:
        counts: what the step's losses are divided by; at least one item.
        samples: digest of the samples.
        costs: int64[ranks], the cost of each process's batches.
        stops: whether a process is asked to stop.
    """

    counts: Counts
    samples: int
    costs: torch.Tensor
    stops: bool


class Meetings:
    """Exchanges between ranks, one collective each.

    Every rank must construct it, and make the same calls in the same order. No collective takes
    longer than `timeout` seconds.

    Args:
        accelerator: joins the processes.
        timeout: seconds.
        stop: whether this process is asked to stop.
        writer: what writes this process's checkpoints.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        timeout: float,
        *,
        stop: Callable[[], bool],
        writer: CheckpointWriter,
    ) -> None:
        self.ranks = accelerator.num_processes
        self.stop = stop
        self.writer = writer
        self._group: Any = None
        if self.ranks > 1 and "cpu:gloo" not in dist.get_backend_config():
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def before_step(self, counts: Counts, samples: int, cost: int) -> Meeting:
        """Meets before a step, of which this process has these counts, a digest and a cost.

        Raises `TrainingError` as `stopping` does.
        """
        by_rank = self._gathered([*counts, samples, cost])
        items, tokens, samples, _ = by_rank[:, :4].sum(0).tolist()
        totals = Counts(max(items, 1), tokens)
        return Meeting(totals, samples % DIGESTS, by_rank[:, 3], self._stops(by_rank))

    def stopping(self) -> bool:
        """Whether any process is asked to stop.

        Raises `TrainingError` on all processes if the last checkpoint could not be written.
        """
        return self._stops(self._gathered([]))

    def written(self) -> None:
        """Meets once the last checkpoint is written. Raises `TrainingError` as `stopping` does."""
        self.writer.settle()
        self.stopping()

    def _gathered(self, figures: Sequence[int]) -> torch.Tensor:
        """int64[ranks, n + 2]: the figures of every process and its flags, on the CPU."""
        return self.by_rank([*figures, int(self.stop()), int(self.writer.failed())])

    def by_rank(self, figures: Sequence[int]) -> torch.Tensor:
        """int64[ranks, n]: the figures of every process, on the CPU."""
        mine = torch.tensor([list(figures)], dtype=torch.int64)
        if self.ranks == 1:
            return mine
        by_rank = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(by_rank, mine, group=self._group)
        return torch.cat(by_rank)

    def _stops(self, by_rank: torch.Tensor) -> bool:
        stops, failed = by_rank[:, -2:].any(0).tolist()
        if failed:
            self.writer.wait()
            raise TrainingError("rank 0 could not write its checkpoint")
        return stops
