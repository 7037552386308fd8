"""Answers in the form of the API, whole or as the events of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence

from vlm_tune.data.chat.processor import Processor
from vlm_tune.generation.answers import Answer
from vlm_tune.serving.jobs import Finished, Piece, ScoredToken
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


def token_logprobs(
    processor: Processor, before: Sequence[int], scored: Iterable[ScoredToken]
) -> Iterator[TokenLogprob]:
    """Tokens of an answer with their log-probabilities, which follow those of the ids `before`.

    A token's text is what it adds to the answer; of part of a character it is U+FFFD.
    """
    ids = list(before[-WINDOW:])
    for token in scored:
        start = len(processor.raw_text(ids))

        def top(
            token_id: int, logprob: float, before: Sequence[int] = ids, start: int = start
        ) -> TopLogprob:
            text = processor.raw_text([*before, token_id])[start:]
            return TopLogprob(token=text, logprob=logprob, bytes=_bytes(text))

        this = top(token.id, token.logprob)
        yield TokenLogprob(
            token=this.token,
            logprob=this.logprob,
            bytes=this.bytes,
            top_logprobs=[top(*each) for each in token.top.items()],
        )
        ids = [*ids, token.id][-WINDOW:]


def _scored(answer: Answer, start: int) -> list[ScoredToken]:
    """The tokens of an answer from the one at `start` on, if it has their log-probabilities."""
    tops = answer.top_logprobs or ({},) * len(answer.ids)
    tokens = zip(answer.ids, answer.logprobs or (), tops, strict=False)
    return [ScoredToken(*each) for each in tokens][start:]


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
        self._reasoned: dict[int, int] = {}
        # The ids of each answer's tokens whose log-probabilities were streamed.
        self._scored: dict[int, list[int]] = {}

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
                    message=AnswerMessage(
                        content=each.whole.text, reasoning_content=each.whole.reasoning
                    ),
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
        content = list(token_logprobs(self._processor, (), _scored(answer, 0)))
        return Logprobs(content=content, refusal=None)

    def usage(self) -> Usage:
        """The numbers of tokens; a prompt counts once, however many answers it has."""
        prompt = self.finished[0].prompt_tokens
        answers = sum(len(each.whole.ids) for each in self.finished)
        return Usage(prompt_tokens=prompt, completion_tokens=answers, total_tokens=prompt + answers)

    def piece(self, event: Piece) -> str:
        """The chunk of more text of an answer, as JSON; an answer's first one names the role."""
        begun = event.answer in self._shown
        self._shown[event.answer] = self._shown.get(event.answer, 0) + len(event.text)
        reasoned = self._reasoned.get(event.answer, 0) + len(event.reasoning)
        self._reasoned[event.answer] = reasoned
        fields: dict[str, str] = {} if begun else {"role": "assistant"}
        if event.reasoning:
            fields["reasoning_content"] = event.reasoning
        if event.text or not event.reasoning:
            fields["content"] = event.text
        choice = ChunkChoice(
            index=event.answer, delta=Delta.model_validate(fields), finish_reason=None
        )
        if event.scored:
            choice.logprobs = self._streamed_logprobs(event.answer, event.scored)
        return self._chunk(choice)

    def end(self, event: Finished) -> Iterator[str]:
        """The chunks of an answer's end, as JSON, with what no piece had.

        That is text, and the log-probabilities of tokens whose text came with others or never.
        """
        self.finished.append(event)
        rest = event.whole.text[self._shown.get(event.answer, 0) :]
        reasoning = (event.whole.reasoning or "")[self._reasoned.get(event.answer, 0) :]
        scored: Sequence[ScoredToken] = ()
        if self._logprobs:
            scored = _scored(event.whole, len(self._scored.get(event.answer, ())))
        if rest or reasoning or event.answer not in self._shown:
            yield self.piece(Piece(event.answer, rest, tuple(scored), reasoning))
            scored = ()
        choice = ChunkChoice(
            index=event.answer, delta=Delta(), finish_reason=event.whole.finish_reason
        )
        if scored:
            choice.logprobs = self._streamed_logprobs(event.answer, scored)
        if event.whole.probabilities is not None:
            choice.probabilities = event.whole.probabilities
        yield self._chunk(choice)

    def _streamed_logprobs(self, answer: int, scored: Sequence[ScoredToken]) -> Logprobs:
        """The log-probabilities of an answer's next tokens."""
        before = self._scored.setdefault(answer, [])
        content = list(token_logprobs(self._processor, before, scored))
        before += [token.id for token in scored]
        return Logprobs(content=content, refusal=None)

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
