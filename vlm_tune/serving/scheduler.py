"""Which jobs are answered when; a step at a time, in whatever thread calls."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.serving.alone import Alone
from vlm_tune.serving.batch import Batch, batching_reason
from vlm_tune.serving.request import Request

PREFIX_BYTES = 1 << 30
"""Most bytes of keys and values that are remembered of prompts, of all models together."""

FEATURE_BYTES = 1 << 28
"""Most bytes of images' features that are remembered, of all models together."""


class Scheduler:
    """Answers jobs in steps; one thread at a time may call it.

    Attributes:
        batches: The lanes of the models whose jobs are answered together.
        waiting: The jobs that wait, in their order.
    """

    def __init__(self, models: Mapping[str, VisionLanguageModel], batch: int) -> None:
        """Begins without jobs.

        Args:
            models: The models by the names under which they are served.
            batch: The most answers of a model that are generated at a time.
        """
        self.batches = {
            name: Batch(model, batch, PREFIX_BYTES // len(models), FEATURE_BYTES // len(models))
            for name, model in models.items()
            if batching_reason(model) is None
        }
        self.waiting: deque[Request] = deque()
        self._alone = Alone()

    @property
    def running(self) -> int:
        """The number of jobs that are being answered."""
        return self._alone.running + sum(batch.running for batch in self.batches.values())

    def add(self, request: Request) -> None:
        """Takes a job, which waits for its turn."""
        self.waiting.append(request)

    def step(self) -> None:
        """Admits jobs that wait, and answers on a little."""
        self._admit()
        self._alone.step()
        for batch in self.batches.values():
            batch.step()

    def _admit(self) -> None:
        """Lets jobs join their lanes, in their order; a full lane keeps others not waiting."""
        full: set[Alone | Batch] = set()
        # Other threads count those that wait, so they are not taken out and put back.
        still: deque[Request] = deque()
        for request in self.waiting:
            if request.ended:
                continue
            lane = self._lane(request)
            if lane in full or not lane.has_room(request):
                full.add(lane)
                still.append(request)
            else:
                lane.add(request)
        self.waiting = still

    def _lane(self, request: Request) -> Alone | Batch:
        """Where a job is answered: choices and beam searches are so one by one."""
        job = request.job
        if job.choices or job.decoding.num_beams > 1:
            return self._alone
        return self.batches.get(job.model, self._alone)
