"""Numbers that the processes exchange over the CPU, so that no GPU is waited for."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator


class HostGroup:
    """The processes that train together, joined by gloo; every process must make one.

    No collective takes longer than `timeout` seconds.
    """

    def __init__(self, accelerator: Accelerator, timeout: float) -> None:
        self.ranks = accelerator.num_processes
        self._group: Any = None
        if self.ranks > 1 and "cpu:gloo" not in dist.get_backend_config():
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def gathered(self, figures: Sequence[int]) -> torch.Tensor:
        """int64[ranks, n]: the n figures of every process, on the CPU."""
        mine = torch.tensor([figures], dtype=torch.int64)
        if self.ranks == 1:
            return mine
        by_rank = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(by_rank, mine, group=self._group)
        return torch.cat(by_rank)
