"""Answers jobs one after the other, without a batch."""

from __future__ import annotations

from collections.abc import Generator, Iterator

from vlm_tune.generation.answering import prompt_answers
from vlm_tune.generation.answers import Answer
from vlm_tune.generation.choices import choose
from vlm_tune.generation.streaming import streamed
from vlm_tune.serving.jobs import Failed, Finished, JobEvent, Piece
from vlm_tune.serving.request import Request

Events = Generator[JobEvent, None, None]


def events_of(request: Request) -> Events:
    """Yields the events of a job while it is answered by itself; closing it stops the work."""
    job = request.job
    model = request.model
    fetch = request.images.pixels
    with model.evaluating():
        if job.choices:
            yield from _whole(
                request, choose(model, [job.conversation], [job.choices], fetch=fetch)
            )
        elif job.answers > 1:
            (first,) = prompt_answers(model, [request.prompt], job.decoding, fetch=fetch)
            yield from _whole(request, [first, *first.alternatives])
        else:
            answering = streamed(model, request.prompt, job.decoding, fetch)
            answer = yield from _in_pieces(answering)
            yield Finished(0, answer, len(request.prompt.input_ids))


def _whole(request: Request, answers: list[Answer]) -> Iterator[JobEvent]:
    """Answers that come as a whole."""
    for number, answer in enumerate(answers):
        if answer.text:
            yield Piece(number, answer.text)
        yield Finished(number, answer, len(request.prompt.input_ids))


def _in_pieces(answering: Generator[str, None, Answer]) -> Generator[Piece, None, Answer]:
    """The pieces of a job's one answer, which the generator returns."""
    while True:
        try:
            text = next(answering)
        except StopIteration as end:
            return end.value
        yield Piece(0, text)


class Alone:
    """A lane of jobs that are answered one after the other, an event a step."""

    def __init__(self) -> None:
        self._request: Request | None = None
        self._events: Events | None = None

    @property
    def running(self) -> int:
        """The number of jobs here, at most one."""
        return int(self._request is not None)

    def has_room(self, request: Request) -> bool:
        """Whether a job can be added: none is here."""
        return self._request is None

    def add(self, request: Request) -> None:
        """Takes a job."""
        self._request = request
        self._events = events_of(request)

    def step(self) -> None:
        """Answers on until the next event."""
        request = self._request
        if request is None or self._events is None:
            return
        event: JobEvent | None = None
        try:
            event = None if request.ended else next(self._events, None)
        except Exception as error:  # whatever it is, it ends this job alone
            event = Failed(error)
        if event is not None:
            request.emit(event)
        if event is None or request.ended:
            self._events.close()
            self._events = None
            self._request = None
