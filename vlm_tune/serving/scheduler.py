"""Which jobs are answered when; a step at a time, in whatever thread calls."""

from __future__ import annotations

from collections import deque

from vlm_tune.serving.alone import Alone
from vlm_tune.serving.request import Request


class Scheduler:
    """Answers jobs in steps; one thread at a time may call it."""

    def __init__(self, batch: int) -> None:
        """Begins without jobs.

        Args:
            batch: The most answers that are written at a time.
        """
        self.batch = batch
        self.waiting: deque[Request] = deque()
        self._alone = Alone()

    @property
    def running(self) -> int:
        """The number of jobs that are being answered."""
        return self._alone.running

    def add(self, request: Request) -> None:
        """Takes a job, which waits for its turn."""
        self.waiting.append(request)

    def step(self) -> None:
        """Admits jobs that wait, and answers on a little."""
        while self.waiting and not self._alone.running:
            request = self.waiting.popleft()
            if not request.ended:
                self._alone.add(request)
        self._alone.step()
