"""Jobs that the server gives to its engine, and the events that the engine answers with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from vlm_tune.data.types import Conversation, Media
from vlm_tune.errors import VlmTuneError
from vlm_tune.generation.answers import Answer
from vlm_tune.model.language.decoding import Decoding


class Overloaded(VlmTuneError):
    """The engine's queue is full: the job may be submitted again later."""


class Closing(VlmTuneError):
    """The engine takes no more jobs, or was closed before the job's end."""


class EngineFailed(VlmTuneError):
    """The engine's thread has ended by a fault: no job is answered any more."""


@dataclass(frozen=True)
class Job:
    """A request for answers to one conversation.

    Attributes:
        conversation: The turns and their images; it ends in a question.
        decoding: How answers are generated; `num_return_sequences` is how many.
        model: The name under which the model is served.
        choices: Texts of which the likeliest is the answer; none are generated then.
    """

    conversation: Conversation
    decoding: Decoding
    model: str
    choices: tuple[str, ...] = ()

    @property
    def answers(self) -> int:
        """The number of answers that end the job."""
        return 1 if self.choices else self.decoding.num_return_sequences


@dataclass(frozen=True)
class EmbeddingJob:
    """A request for the vectors of texts and images.

    Attributes:
        inputs: The texts and images, in the order of their vectors.
        model: The name under which the model is served.
        answers: The number of answers that end the job: all vectors are one.
    """

    inputs: tuple[str | Media, ...]
    model: str
    answers: ClassVar[int] = 1


@dataclass(frozen=True)
class ScoredToken:
    """A token's id, its log-probability, and those of the likeliest tokens in its place, by id."""

    id: int
    logprob: float
    top: Mapping[int, float]


@dataclass(frozen=True)
class Piece:
    """More text of an answer, which later tokens can't change.

    Attributes:
        answer: The number of the answer, from 0.
        text: What is added to its text.
        reasoning: What is added to the reasoning before it.
        scored: The tokens since the last piece, where log-probabilities are wanted and the answer
            is written in a batch; else they are in the whole answer alone.
    """

    answer: int
    text: str
    scored: tuple[ScoredToken, ...] = ()
    reasoning: str = ""


@dataclass(frozen=True)
class Finished:
    """An answer's end. `answer` is its number, `whole` the answer, `prompt_tokens` its prompt's.

    A prompt's tokens include those of its images.
    """

    answer: int
    whole: Answer
    prompt_tokens: int


@dataclass(frozen=True)
class Embedded:
    """The end of an `EmbeddingJob`: the inputs' unit vectors fp32[N, E], and all their tokens."""

    vectors: np.ndarray
    tokens: int


@dataclass(frozen=True)
class Failed:
    """The end of a job that can't be answered, with the error to show."""

    error: Exception


JobEvent = Piece | Finished | Embedded | Failed
Listener = Callable[[JobEvent], None]
"""Takes a job's events in their order, in a thread of the engine's; it must return at once."""


class Ticket(Protocol):
    """A job that an engine took."""

    def cancel(self) -> None:
        """Stops the job as soon as possible; no event follows once it has. Can be repeated."""
        ...


class Engine(Protocol):
    """Answers jobs, many at a time."""

    @property
    def failed(self) -> bool:
        """Whether a fault has ended it: it answers no more jobs."""
        ...

    @property
    def waiting(self) -> int:
        """The number of jobs in the queue."""
        ...

    @property
    def running(self) -> int:
        """The number of jobs that are being answered."""
        ...

    def submit(self, job: Job | EmbeddingJob, listener: Listener) -> Ticket:
        """Takes a job, whose events the listener gets: of each answer pieces and its end.

        Raises:
            Overloaded: The queue is full.
            Closing: The engine takes no more jobs.
            EngineFailed: A fault has ended the engine.
            VlmTuneError: The job can't be answered, such as a prompt that is too long.
        """
        ...

    def close(self, seconds: float) -> None:
        """Takes no more jobs, and waits up to `seconds` for those that it took.

        What is not answered by then is stopped: its last event is `Failed` with `Closing`.
        """
        ...
