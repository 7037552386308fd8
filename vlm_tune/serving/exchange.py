"""A job's events on their way from the engine's thread to a request in the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import Executor, Future
from contextlib import suppress

from vlm_tune.serving.jobs import (
    Embedded,
    EmbeddingJob,
    Engine,
    Failed,
    Finished,
    Job,
    JobEvent,
    Piece,
    Ticket,
)


class Exchange:
    """The events of one job, for one reader.

    Pieces that the reader has not taken are joined, so that no more waits for it than the text and
    the log-probabilities of the answers.

    Args:
        engine: The engine that answers.
        job: The job.
    """

    def __init__(self, engine: Engine, job: Job | EmbeddingJob) -> None:
        self._engine = engine
        self._job = job
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._events: list[JobEvent] = []
        self._unfinished = job.answers
        self._ticket: Ticket | None = None
        self._closed = False

    async def submit(self, pool: Executor) -> None:
        """Gives the job to the engine, in a thread, since its prompt is laid out there.

        Raises:
            VlmTuneError: The engine does not take the job.
        """
        submitted = pool.submit(self._engine.submit, self._job, self._listen)
        submitted.add_done_callback(self._submitted)
        await asyncio.shield(asyncio.wrap_future(submitted))

    def _submitted(self, submitted: Future[Ticket]) -> None:
        """Notes the ticket; a job whose request has left meanwhile is cancelled."""
        if submitted.cancelled() or submitted.exception() is not None:
            return
        self._ticket = submitted.result()
        if self._closed:
            self._ticket.cancel()

    def close(self) -> None:
        """Ends the job, if it runs."""
        self._closed = True
        if self._ticket is not None:
            self._ticket.cancel()

    def _listen(self, event: JobEvent) -> None:
        # The loop may have ended before the engine's thread.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._take, event)

    def _take(self, event: JobEvent) -> None:
        if isinstance(event, Piece):
            for place, waiting in enumerate(self._events):
                if isinstance(waiting, Piece) and waiting.answer == event.answer:
                    self._events[place] = Piece(
                        event.answer,
                        waiting.text + event.text,
                        waiting.scored + event.scored,
                        waiting.reasoning + event.reasoning,
                    )
                    return
        self._events.append(event)
        self._ready.set()

    async def events(self) -> AsyncIterator[Piece | Finished]:
        """Yields the events of a job for answers, up to the last one's end.

        Raises:
            Exception: The job has failed, with this error.
        """
        async for event in self._all():
            assert not isinstance(event, Embedded)
            yield event

    async def vectors(self) -> Embedded:
        """The vectors of a job for them.

        Raises:
            Exception: The job has failed, with this error.
        """
        event = await anext(self._all())
        assert isinstance(event, Embedded)
        return event

    async def _all(self) -> AsyncGenerator[Piece | Finished | Embedded]:
        while self._unfinished:
            await self._ready.wait()
            self._ready.clear()
            events = self._events
            self._events = []
            for event in events:
                if isinstance(event, Failed):
                    raise event.error
                self._unfinished -= isinstance(event, Finished | Embedded)
                yield event
