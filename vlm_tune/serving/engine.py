"""The engine of the server: a thread that answers jobs, and the queue before it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping

from vlm_tune.errors import ArgumentError
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.model.language.decoding import check_count
from vlm_tune.quoting import quoted
from vlm_tune.serving.batch import batching_reason
from vlm_tune.serving.embedding import EmbeddingRequest
from vlm_tune.serving.failures import log_failure
from vlm_tune.serving.jobs import (
    Closing,
    EmbeddingJob,
    EngineFailed,
    Failed,
    Job,
    Listener,
    Overloaded,
)
from vlm_tune.serving.request import Request, Submitted, request_of
from vlm_tune.serving.scheduler import Scheduler

PATIENCE = 5.0
"""Seconds that `close` waits for the thread to see that it is over; a beam search may not."""


class BatchingEngine:
    """Answers the jobs of a server in one thread, see `Engine`.

    Several threads may submit jobs. A job's prompt is laid out and its images are decoded in the
    thread that submits it.

    Attributes:
        one_by_one: Why the jobs of a model, by its name, are not answered together, but one by
            one; it has no entry of a model whose jobs are.
    """

    def __init__(
        self, models: Mapping[str, VisionLanguageModel], *, queue: int, batch: int
    ) -> None:
        """Starts the thread.

        Args:
            models: The models by the names under which they are served.
            queue: The most jobs that wait.
            batch: The most answers of a model that are generated at a time.

        Raises:
            ArgumentError: `queue` or `batch` is not a positive integer.
        """
        check_count("queue", queue)
        check_count("batch", batch)
        self._models = dict(models)
        reasons = {name: batching_reason(model) for name, model in models.items()}
        self.one_by_one = {name: reason for name, reason in reasons.items() if reason}
        self._queue = queue
        self._batch = batch
        self._scheduler = Scheduler(self._models, batch)
        self._arrived: deque[Request | EmbeddingRequest] = deque()
        self._open: set[Request | EmbeddingRequest] = set()
        self._changed = threading.Condition()
        self._closing = False
        self._over = False
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether a fault has ended the thread: no more jobs are answered."""
        return self._failed

    @property
    def waiting(self) -> int:
        """The number of jobs in the queue."""
        return len(self._arrived) + len(self._scheduler.waiting)

    @property
    def running(self) -> int:
        """The number of jobs that are being answered."""
        return self._scheduler.running

    def submit(self, job: Job | EmbeddingJob, listener: Listener) -> Submitted:
        """Takes a job, whose events the listener gets: of each answer pieces and its end.

        Raises:
            Overloaded: The queue is full.
            Closing: The engine takes no more jobs.
            EngineFailed: A fault has ended the thread.
            VlmTuneError: The job can't be answered: its prompt is too long, an image is unreadable.
        """
        model = self._models.get(job.model)
        if model is None:
            names = ", ".join(sorted(self._models))
            raise ArgumentError(f"no model {quoted(job.model)} is served; expected one of {names}")
        # A full queue refuses a job before any work.
        with self._changed:
            self._check_room()
        computed = self._scheduler.features[job.model]
        if isinstance(job, EmbeddingJob):
            request = EmbeddingRequest(job, model, listener, computed)
        else:
            request = request_of(job, model, listener, computed)
        with self._changed:
            self._check_room()
            self._arrived.append(request)
            self._open.add(request)
            self._changed.notify_all()
        return request

    def _check_room(self) -> None:
        if self._failed:
            raise EngineFailed("the engine has failed: the server has to be started again")
        if self._closing:
            raise Closing("the server is stopping and takes no more questions: ask again later")
        if self.waiting >= self._queue:
            raise Overloaded(
                f"{self.waiting} questions wait already, as many as may: ask again later"
            )

    def close(self, seconds: float) -> None:
        """Takes no more jobs, and waits up to `seconds` for those that it took.

        What is not answered by then is stopped: its last event is `Failed` with `Closing`.
        """
        with self._changed:
            self._closing = True
            self._changed.wait_for(lambda: not self._open, seconds)
            self._over = True
            unanswered = list(self._open)
            self._changed.notify_all()
        for request in unanswered:
            request.stop()
        self._thread.join(PATIENCE)

    def _run(self) -> None:
        try:
            self._answer()
        # Nothing else watches the thread: `failed` is the only sign of its end.
        except BaseException as error:
            log_failure(error, "in the engine, which answers no more jobs")
            with self._changed:
                self._failed = True
                unanswered = list(self._open)
                self._open.clear()
                self._changed.notify_all()
            for request in unanswered:
                request.emit(Failed(EngineFailed("the engine failed before the answer's end")))

    def _answer(self) -> None:
        """Answers jobs until the engine is closed."""
        while self._next():
            try:
                self._scheduler.step()
            # A panic of a library in Rust, such as a tokenizer, is no Exception.
            except BaseException as error:
                # A lane ends the jobs at fault by itself; this is the engine's own fault, and what
                # its lanes have is of no use any more.
                log_failure(error, "in the engine")
                self._scheduler = Scheduler(self._models, self._batch)
                panic = RuntimeError("the engine failed")
                with self._changed:
                    begun = self._open.difference(self._arrived)
                for request in begun:
                    request.emit(Failed(error if isinstance(error, Exception) else panic))

    def _next(self) -> bool:
        """Waits for jobs; returns whether there is a further step."""
        with self._changed:
            ended = [request for request in self._open if request.ended]
            self._open.difference_update(ended)
            if ended:
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._over or self._open)
            while self._arrived:
                self._scheduler.add(self._arrived.popleft())
            return not self._over
