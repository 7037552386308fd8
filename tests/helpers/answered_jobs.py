"""Jobs for the server's engine, and listeners that note their events."""

from __future__ import annotations

import threading
from typing import Any

from vlm_tune.generation.answers import Answer
from vlm_tune.generation.requests import request_conversation
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.serving.jobs import Failed, Finished, Job, JobEvent, Piece


class Listening:
    """A listener; it notes events and checks that they come as they should.

    Attributes:
        texts: The texts of the answers so far, by the answer's number.
        answers: The answers that ended.
        error: Why the job failed.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.texts: dict[int, str] = {}
        self.answers: dict[int, Answer] = {}
        self.error: Exception | None = None
        self.prompt_tokens = 0
        self.events = 0
        self._ended = threading.Event()
        self._begun = threading.Event()

    def __call__(self, event: JobEvent) -> None:
        assert not self._ended.is_set(), "an event after the end"
        self.events += 1
        if isinstance(event, Piece):
            assert event.text and event.answer not in self.answers
            self.texts[event.answer] = self.texts.get(event.answer, "") + event.text
        elif isinstance(event, Finished):
            assert event.answer not in self.answers
            assert self.texts.get(event.answer, "") == event.whole.text
            self.answers[event.answer] = event.whole
            self.prompt_tokens = event.prompt_tokens
        else:
            assert isinstance(event, Failed)
            self.error = event.error
        self._begun.set()
        wanted = 1 if self.job.choices else self.job.decoding.num_return_sequences
        if self.error is not None or len(self.answers) == wanted:
            self._ended.set()

    @property
    def ended(self) -> bool:
        """Whether the job ended."""
        return self._ended.is_set()

    def wait(self) -> Listening:
        """Waits for the job's end."""
        assert self._ended.wait(60), "the job does not end"
        return self

    def wait_for_an_event(self) -> None:
        """Waits until the job has begun."""
        assert self._begun.wait(60), "the job does not begin"


def job_of(
    prompt: Any,
    images: Any = (),
    *,
    model: str = "tiny",
    choices: tuple[str, ...] = (),
    **settings: Any,
) -> Job:
    """A job for an engine: the arguments are those of `VisionLanguageModel.answer`."""
    name = "prompt" if isinstance(prompt, str) else "messages"
    conversation = request_conversation(1, {name: prompt, "images": images})
    return Job(conversation, Decoding.of(settings), model, choices)
