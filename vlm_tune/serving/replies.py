"""Answers in the form of the API, whole or as the events of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence

from vlm_tune.data.chat.processor import Processor
from vlm_tune.generation.answers import Answer
from vlm_tune.serving.jobs import Finished
from vlm_tune.serving.wire import (
    AnswerMessage,
    Chunk,
    ChunkChoice,
    Completion,
    CompletionChoice,
    Delta,
    Logprobs,
    TokenLogprob,
    TopLogprob,
    Usage,
)

WINDOW = 8
"""Tokens before one that are decoded with it: its text may depend on them."""


def token_logprobs(processor: Processor, answer: Answer) -> Iterator[TokenLogprob]:
    """The tokens of an answer that has their log-probabilities.

    A token's text is what it adds to the answer; of part of a character it is U+FFFD.
    """
    ids = answer.ids
    likeliest = answer.top_logprobs or ({},) * len(ids)
    for place, (logprob, tops) in enumerate(zip(answer.logprobs or (), likeliest, strict=True)):
        before = ids[max(place - WINDOW, 0) : place]
        start = len(processor.raw_text(before))

        def top(
            token: int, logprob: float, before: Sequence[int] = before, start: int = start
        ) -> TopLogprob:
            text = processor.raw_text([*before, token])[start:]
            return TopLogprob(token=text, logprob=logprob, bytes=_bytes(text))

        this = top(ids[place], logprob)
        yield TokenLogprob(
            token=this.token,
            logprob=logprob,
            bytes=this.bytes,
            top_logprobs=[top(*each) for each in tops.items()],
        )


def _bytes(text: str) -> list[int] | None:
    """The bytes of a token's text; None where it is part of a character."""
    return None if "\ufffd" in text else list(text.encode())


class Reply:
    """The answer to one request, put together from its job's events.

    Args:
        name: Of the model.
        processor: The model's.
        logprobs: Whether the log-probabilities of tokens are shown.

    Attributes:
        id: Names the answer.
        finished: The ended answers, in the order in which they ended.
    """

    def __init__(self, name: str, processor: Processor, *, logprobs: bool = False) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.finished: list[Finished] = []
        self._name = name
        self._processor = processor
        self._logprobs = logprobs
        self._created = int(time.time())
        self._shown: dict[int, int] = {}

    def completion(self) -> Completion:
        """The whole answer."""
        ordered = sorted(self.finished, key=lambda each: each.answer)
        return Completion(
            id=self.id,
            created=self._created,
            model=self._name,
            choices=[
                CompletionChoice(
                    index=each.answer,
                    message=AnswerMessage(content=each.whole.text),
                    logprobs=self._logprobs_of(each.whole),
                    finish_reason=each.whole.finish_reason,
                    probabilities=each.whole.probabilities,
                )
                for each in ordered
            ],
            usage=self.usage(),
        )

    def _logprobs_of(self, answer: Answer) -> Logprobs | None:
        if not self._logprobs or answer.logprobs is None:
            return None
        return Logprobs(content=list(token_logprobs(self._processor, answer)), refusal=None)

    def usage(self) -> Usage:
        """The numbers of tokens; a prompt counts once, however many answers it has."""
        prompt = self.finished[0].prompt_tokens
        answers = sum(len(each.whole.ids) for each in self.finished)
        return Usage(prompt_tokens=prompt, completion_tokens=answers, total_tokens=prompt + answers)

    def piece(self, answer: int, text: str) -> str:
        """The chunk of more text of an answer, as JSON; an answer's first one names the role."""
        begun = answer in self._shown
        self._shown[answer] = self._shown.get(answer, 0) + len(text)
        delta = Delta(content=text) if begun else Delta(role="assistant", content=text)
        return self._chunk(ChunkChoice(index=answer, delta=delta, finish_reason=None))

    def end(self, event: Finished) -> Iterator[str]:
        """The chunks of an answer's end, as JSON, with the text that no piece had."""
        self.finished.append(event)
        rest = event.whole.text[self._shown.get(event.answer, 0) :]
        if rest or event.answer not in self._shown:
            yield self.piece(event.answer, rest)
        choice = ChunkChoice(
            index=event.answer, delta=Delta(), finish_reason=event.whole.finish_reason
        )
        if self._logprobs:
            choice.logprobs = self._logprobs_of(event.whole)
        if event.whole.probabilities is not None:
            choice.probabilities = event.whole.probabilities
        yield self._chunk(choice)

    def last(self) -> str:
        """The chunk of the numbers of tokens, as JSON."""
        return self._json(self._chunk_of([]).model_copy(update={"usage": self.usage()}))

    def _chunk(self, choice: ChunkChoice) -> str:
        return self._json(self._chunk_of([choice]))

    def _chunk_of(self, choices: list[ChunkChoice]) -> Chunk:
        return Chunk(
            id=self.id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._name,
            choices=choices,
        )

    def _json(self, chunk: Chunk) -> str:
        return chunk.model_dump_json(exclude_unset=True)
