"""A job that the engine took: its prompt and images, and the way of its events to the listener."""

from __future__ import annotations

import threading
from collections.abc import Container

from vlm_tune.data.types import Example
from vlm_tune.errors import DataError, ModelError
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.generation.choices import answered, choices_of_each
from vlm_tune.generation.constraints import json_constraint
from vlm_tune.serving.failures import log_failure
from vlm_tune.serving.features import JobImages
from vlm_tune.serving.jobs import Closing, Embedded, Failed, Finished, Job, JobEvent, Listener
from vlm_tune.serving.prefixes import Beginning, beginning_of


class Submitted:
    """A job that the engine took; the `Ticket` of who submitted it.

    Args:
        listener: Gets its events.
        answers: The number of answers that end it.
    """

    def __init__(self, listener: Listener, answers: int) -> None:
        self._listener = listener
        self._ended = False
        self._unfinished = answers
        # A listener may cancel its own job.
        self._lock = threading.RLock()

    @property
    def ended(self) -> bool:
        """Whether no event follows: the job was answered, failed or was cancelled."""
        return self._ended

    def cancel(self) -> None:
        """Stops the job as soon as possible; no event follows. Can be repeated."""
        with self._lock:
            self._ended = True

    def emit(self, event: JobEvent) -> None:
        """Hands an event to the listener, unless the job has ended.

        A listener that fails ends the job.
        """
        with self._lock:
            if self._ended:
                return
            if isinstance(event, Finished | Embedded):
                self._unfinished -= 1
            self._ended = isinstance(event, Failed) or self._unfinished == 0
            try:
                self._listener(event)
            except Exception as error:
                self._ended = True
                log_failure(error, "in a listener of the engine")

    def stop(self) -> None:
        """Ends a job that the engine has no more time for."""
        self.emit(Failed(Closing("the server stopped before the answer's end: ask again later")))


class Request(Submitted):
    """A job for answers with its model and prompt.

    Attributes:
        job: The job.
        model: The model that answers it.
        prompt: The laid out conversation.
        choices: The conversation with each of the job's choices, laid out.
        images: Its images.
        constraint: The `json_constraint` of its settings.
    """

    def __init__(
        self,
        job: Job,
        model: VisionLanguageModel,
        prompt: Example,
        choices: list[Example],
        images: PromptImages,
        listener: Listener,
    ) -> None:
        super().__init__(listener, job.answers)
        self.job = job
        self.model = model
        self.prompt = prompt
        self.choices = choices
        self.images = images
        self.constraint = json_constraint(model.processor, job.decoding, model.llm.vocabulary)


class PromptImages(JobImages):
    """The images of a prompt.

    Attributes:
        beginning: The whole prompt, by which its prefix is looked up; empty for a native model,
            which reads images with whole rows and shares no prefix.
    """

    def __init__(
        self, prompt: Example, model: VisionLanguageModel, computed: Container[bytes]
    ) -> None:
        """Decodes the images of a prompt; see `JobImages`."""
        super().__init__(prompt.media, model, computed)
        self.beginning = Beginning(b"", ())
        if not model.llm.native:
            tokens_per_image = model.processor.spec.tokens_per_image
            self.beginning = beginning_of(prompt, tokens_per_image, self.digests)


def request_of(
    job: Job, model: VisionLanguageModel, listener: Listener, computed: Container[bytes]
) -> Request:
    """Lays out a job's prompt and decodes its images, in the caller's thread.

    `computed` are the digests of images whose features are there.

    Raises:
        DataError: The prompt, or it with a choice, is longer than the model takes or has positions
            for, or an image can't be decoded.
        ArgumentError: The choices are no list of different texts, or no answer can follow a
            `json_schema`.
    """
    choices: list[Example] = []
    if job.choices:
        choices_of_each(list(job.choices), 1)
        choices = answered(model, job.conversation, job.choices)
    processor = model.processor.thinking(job.decoding.enable_thinking)
    (prompt,) = processor.prompts([job.conversation])
    try:
        model.llm.check_length(model.llm.virtual + len(prompt.input_ids))
    except ModelError as error:
        raise DataError(str(error), kind="overlong") from None
    return Request(job, model, prompt, choices, PromptImages(prompt, model, computed), listener)
