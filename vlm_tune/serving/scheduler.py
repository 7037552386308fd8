"""Which jobs are answered when; a step at a time, in whatever thread calls."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Protocol, TypeVar

from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.serving.alone import Alone, events_of
from vlm_tune.serving.batch import Batch, batching_reason
from vlm_tune.serving.embedding import EmbeddingRequest, embedding_events
from vlm_tune.serving.features import Features
from vlm_tune.serving.request import Request

PREFIX_BYTES = 1 << 30
"""Most bytes of keys and values that are remembered of prompts, of all models together."""

FEATURE_BYTES = 1 << 28
"""Most bytes of images' features that are remembered, of all models together."""

Joining = TypeVar("Joining", contravariant=True)


class Lane(Protocol[Joining]):
    """Where jobs of a kind are answered."""

    def has_room(self, request: Joining) -> bool:
        """Whether a job can be added."""
        ...

    def add(self, request: Joining) -> None:
        """Takes a job."""
        ...


class Scheduler:
    """Answers jobs in steps; one thread at a time may call it.

    Attributes:
        features: The tower's features of images that came lately, by their model's name.
        batches: The lanes of the models whose jobs are answered together.
        waiting: The jobs that wait, in their order.
    """

    def __init__(self, models: Mapping[str, VisionLanguageModel], batch: int) -> None:
        """Begins without jobs.

        Args:
            models: The models by the names under which they are served.
            batch: The most answers of a model that are generated at a time.
        """
        self.features = {name: Features(FEATURE_BYTES // len(models)) for name in models}
        self.batches = {
            name: Batch(model, batch, PREFIX_BYTES // len(models), self.features[name])
            for name, model in models.items()
            if batching_reason(model) is None
        }
        self.waiting: deque[Request | EmbeddingRequest] = deque()
        self._alone = Alone[Request](
            lambda request: events_of(
                request,
                self.features[request.job.model] if request.job.model in self.batches else None,
            )
        )
        self._vectors = Alone[EmbeddingRequest](
            lambda request: embedding_events(request, self.features[request.job.model])
        )

    @property
    def running(self) -> int:
        """The number of jobs that are being answered."""
        batched = sum(batch.running for batch in self.batches.values())
        return batched + self._alone.running + self._vectors.running

    def add(self, request: Request | EmbeddingRequest) -> None:
        """Takes a job, which waits for its turn."""
        self.waiting.append(request)

    def step(self) -> None:
        """Admits jobs that wait, and answers on a little."""
        self._admit()
        self._alone.step()
        self._vectors.step()
        for batch in self.batches.values():
            batch.step()

    def _admit(self) -> None:
        """Lets jobs join their lanes, in their order; a full lane keeps others not waiting."""
        full: set[object] = set()
        # Other threads count those that wait, so they are not taken out and put back.
        still: deque[Request | EmbeddingRequest] = deque()
        for request in self.waiting:
            if request.ended:
                continue
            if isinstance(request, EmbeddingRequest):
                joined = _joins(self._vectors, request, full)
            else:
                joined = _joins(self._lane(request), request, full)
            if not joined:
                still.append(request)
        self.waiting = still

    def _lane(self, request: Request) -> Lane[Request]:
        """Where a job is answered: choices and beam searches are so one by one."""
        job = request.job
        if job.choices or job.decoding.num_beams > 1:
            return self._alone
        return self.batches.get(job.model, self._alone)


def _joins(lane: Lane[Joining], request: Joining, full: set[object]) -> bool:
    """Lets a job join its lane; returns whether there was room. `full` lanes have none."""
    if lane in full or not lane.has_room(request):
        full.add(lane)
        return False
    lane.add(request)
    return True
