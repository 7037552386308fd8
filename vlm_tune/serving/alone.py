"""Answers jobs one after the other, a step at a time, without a batch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Generic, TypeVar

from vlm_tune.data.batching.collate import Fetch
from vlm_tune.generation.answers import Answer, Written
from vlm_tune.generation.choices import choice_steps
from vlm_tune.generation.streaming import beam_search_steps, streamed_answers
from vlm_tune.serving.features import Features, features_of
from vlm_tune.serving.jobs import Failed, Finished, JobEvent, Piece
from vlm_tune.serving.request import Request, Submitted

CHOICE_TOKENS = 256
"""Tokens of choices that are read in a step: the answers of others wait for it.

It is twice the question's where that is more, since each step reads the question again.
"""
Taken = TypeVar("Taken", bound=Submitted)
Events = Generator[JobEvent | None, None, None]
"""The events of a job, which is answered while they are taken; None ends a step without one."""


def events_of(request: Request, remembered: Features | None) -> Events:
    """Yields the events of a job while it is answered by itself; closing it stops the work.

    `remembered` are features of images that came lately; None where the model's are not remembered.
    """
    job = request.job
    model = request.model
    with model.evaluating():
        if job.choices:
            answer = yield from _chosen(request, remembered)
            yield from _whole(request, [answer])
            return
        fetch = request.images.pixels
        if job.decoding.num_beams > 1:
            answers = yield from beam_search_steps(model, request.prompt, job.decoding, fetch)
            yield from _whole(request, answers)
        else:
            answering = streamed_answers(model, request.prompt, job.decoding, fetch)
            answers = yield from _in_pieces(answering)
            for number, answer in enumerate(answers):
                yield Finished(number, answer, len(request.prompt.input_ids))


def _chosen(request: Request, remembered: Features | None) -> Generator[None, None, Answer]:
    """The likeliest choice; other jobs continue after each step."""
    model = request.model
    fetch: Fetch = request.images.pixels
    if remembered is not None and request.prompt.media:
        media = dict.fromkeys(request.prompt.media)
        fetch = features_of(
            model, remembered, [(request.images, each) for each in media]
        ).__getitem__
        yield
    return (
        yield from choice_steps(
            model,
            request.job.choices,
            request.choices,
            fetch=fetch,
            cached=remembered is not None,
            tokens=max(CHOICE_TOKENS, 2 * len(request.prompt.input_ids)),
        )
    )


def _whole(request: Request, answers: list[Answer]) -> Iterator[JobEvent]:
    """Answers that come as a whole."""
    for number, answer in enumerate(answers):
        if answer.text or answer.reasoning:
            yield Piece(number, answer.text, reasoning=answer.reasoning or "")
        yield Finished(number, answer, len(request.prompt.input_ids))


def _in_pieces(
    answering: Generator[list[tuple[int, Written]], None, list[Answer]],
) -> Generator[Piece | None, None, list[Answer]]:
    """The pieces of a job's answers, which the generator returns; None after each token."""
    with closing(answering):
        while True:
            try:
                texts = next(answering)
            except StopIteration as end:
                return end.value
            yield from (
                Piece(number, written.text, reasoning=written.reasoning)
                for number, written in texts
            )
            yield None


class Alone(Generic[Taken]):
    """A lane of jobs that are answered one after the other, a step at a time.

    Args:
        events: Returns the events of a job.
    """

    def __init__(self, events: Callable[[Taken], Events]) -> None:
        self._events_of = events
        self._request: Taken | None = None
        self._events: Events | None = None

    @property
    def running(self) -> int:
        """The number of jobs here, at most one."""
        return int(self._request is not None)

    def has_room(self, request: Taken) -> bool:
        """Whether a job can be added: none is here."""
        return self._request is None

    def add(self, request: Taken) -> None:
        """Takes a job."""
        self._request = request
        self._events = self._events_of(request)

    def step(self) -> None:
        """Answers on a little."""
        request = self._request
        if request is None or self._events is None:
            return
        over = request.ended
        try:
            event = None if over else next(self._events)
        except StopIteration:
            over = True
            event = None
        except Exception as error:  # whatever it is, it ends this job alone
            event = Failed(error)
        if event is not None:
            request.emit(event)
        if over or request.ended:
            self._events.close()
            self._events = None
            self._request = None
