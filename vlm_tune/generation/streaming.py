"""Answers as they are written: an iterator of pieces of text."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, TypeVar

import numpy as np
import torch

from vlm_tune.data.batch import Batch
from vlm_tune.data.batching.collate import Fetch, collate
from vlm_tune.data.types import Example
from vlm_tune.generation.answering import (
    continuation_of,
    continues,
    filled,
    prompt_rows,
    reader_of,
)
from vlm_tune.generation.answers import Answer, AnswerReader, Written
from vlm_tune.generation.constraints import json_constraint
from vlm_tune.generation.continuing import Continuation
from vlm_tune.generation.generating import generated
from vlm_tune.generation.logprobs import TokenLogprobs
from vlm_tune.generation.picking import Picker, draws, penalised_ids
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.vlm import VisionLanguageNetwork

Pieces = Generator[str, None, Answer]
"""Pieces of an answer's text; they add up to it. The generator returns the answer."""


def streamed(
    model: VisionLanguageNetwork, prompt: Example, decoding: Decoding, fetch: Fetch
) -> Pieces:
    """Answers one prompt; a piece comes as soon as later tokens can't change it.

    Args:
        model: the model, in eval mode.
        prompt: an output of `Processor.prompts`.
        decoding: how the answer is generated; there is one. A beam search gives it in one piece.
        fetch: returns the pixels of a media item.
    """
    if decoding.num_beams > 1:
        reader = reader_of(model, decoding)
        left = model.llm.layout == "causal"
        batch = collate([prompt], model.processor.spec, fetch=fetch, pad_left=left)
        picker = picker_of(model, prompt, decoding)
        ids, _ = generated(model, batch.to(model.device), decoding, picker, reader)
        answer = reader.answer(ids[0], None)
        yield answer.text
        return answer
    answering = streamed_answers(model, prompt, decoding, fetch)
    with closing(answering):
        while True:
            try:
                texts = next(answering)
            except StopIteration as end:
                return end.value[0]
            yield from (written.text for _, written in texts if written.text)


def streamed_answers(
    model: VisionLanguageNetwork, prompt: Example, decoding: Decoding, fetch: Fetch
) -> Generator[list[tuple[int, Written]], None, list[Answer]]:
    """Gives one prompt all its answers together; yields after each token, returns the answers.

    What it yields are the texts to add: (number of the answer, texts), of those that have some. The
    arguments are those of `streamed`; there is no beam search.
    """
    processor = model.processor.thinking(decoding.enable_thinking)
    shown = [
        ShownText(AnswerReader(processor, decoding.stop_strings))
        for _ in range(decoding.num_return_sequences)
    ]
    with closing(_steps(model, prompt, decoding, fetch)) as steps:
        while True:
            try:
                written = next(steps)
            except StopIteration as end:
                answers: list[Answer] = end.value
                break
            texts = [text.more(ids) for text, ids in zip(shown, written, strict=True)]
            yield [(number, text) for number, text in enumerate(texts) if any(text)]
    rests = [text.rest(answer) for text, answer in zip(shown, answers, strict=True)]
    yield [(number, text) for number, text in enumerate(rests) if any(text)]
    return answers


def _steps(
    model: VisionLanguageNetwork, prompt: Example, decoding: Decoding, fetch: Fetch
) -> Generator[list[list[int]], None, list[Answer]]:
    """The ids of all answers to a prompt after each token, which may go on after an answer's end.

    It returns the answers.
    """
    reader = reader_of(model, decoding)
    # Equal prompts are branches of one row, or rows of one branch each.
    rows = prompt_rows(model, [prompt] * decoding.num_return_sequences, decoding)
    order = [place for tree in rows for place in tree.members]
    picker = _picker(model, prompt, decoding, filled([tree.members for tree in rows]))
    continued = continues(model, decoding)
    left = model.llm.layout == "causal" and not continued
    batch = collate([tree.row for tree in rows], model.processor.spec, fetch=fetch, pad_left=left)
    batch = batch.to(model.device)
    if continued:
        continuation = continuation_of(model, batch, rows, decoding, picker, reader)
        # A row of fewer answers than another is filled up with copies of its last one.
        places = [(row, k) for row, tree in enumerate(rows) for k in range(len(tree.members))]
        for count in continuation.run(look_every=1):
            written = continuation.ids[..., :count].tolist()
            yield _ordered([written[row][k] for row, k in places], order)
        ids = [continuation.ids[place].tolist() for place in places]
        scored = None if continuation.logprobs is None else continuation.logprobs.cpu()
        logprobs = [None if scored is None else scored[place] for place in places]
    else:
        with _in_thread(model, batch, decoding, picker, reader) as turns:
            for written in _written(turns.steps()):
                yield _ordered(written, order)
            ids, scores = turns.outcome()
        logprobs = [None if scores is None else scores[row] for row in range(len(ids))]
    return _ordered([reader.answer(*each) for each in zip(ids, logprobs, strict=True)], order)


Item = TypeVar("Item")


def _ordered(items: Sequence[Item], order: Sequence[int]) -> list[Item]:
    """The items by the place that `order` has for each."""
    return [item for _, item in sorted(zip(order, items, strict=True), key=lambda pair: pair[0])]


def picker_of(model: VisionLanguageNetwork, prompt: Example, decoding: Decoding) -> Picker:
    """The picker of one answer to a prompt."""
    return _picker(model, prompt, decoding, [[0]])


def _picker(
    model: VisionLanguageNetwork,
    prompt: Example,
    decoding: Decoding,
    members: Sequence[Sequence[int]],
) -> Picker:
    """The picker of answers to a prompt, by rows and branches; `members` are their numbers."""
    ids = penalised_ids(model.llm, prompt, decoding)
    numbers = None
    if decoding.samples:
        numbers = np.array([[draws(decoding, number) for number in row] for row in members])
    constraint = json_constraint(model.processor, decoding, model.llm.vocabulary)
    prompts = [[ids] * len(row) for row in members]
    return Picker(model.llm, decoding, prompts, numbers, model.device, constraint)


def pieces(continuation: Continuation, reader: AnswerReader) -> Pieces:
    """The pieces of the answer to the one branch that is continued."""
    counts = continuation.run(look_every=1)
    answer = yield from _pieces((continuation.ids[0, 0, :n].tolist() for n in counts), reader)
    if continuation.logprobs is None:
        return answer
    return reader.answer(continuation.ids[0, 0].tolist(), continuation.logprobs[0, 0])


class ShownText:
    """The text of an answer that was shown while it is written; `reader` reads its ids."""

    def __init__(self, reader: AnswerReader) -> None:
        self._reader = reader
        self._shown = Written()

    def more(self, ids: Sequence[int]) -> Written:
        """The texts to add for the ids so far; empty where there is none."""
        now = self._reader.shown(ids)
        longer = [
            new if new.startswith(old) else old for new, old in zip(now, self._shown, strict=True)
        ]
        return self._add(Written(*longer))

    def rest(self, answer: Answer) -> Written:
        """The texts to add at the answer's end."""
        return self._add(Written(answer.text, answer.reasoning or ""))

    def _add(self, whole: Written) -> Written:
        added = [new[len(old) :] for new, old in zip(whole, self._shown, strict=True)]
        self._shown = whole
        return Written(*added)


def _pieces(written: Iterator[list[int]], reader: AnswerReader) -> Pieces:
    shown = ShownText(reader)
    ids: list[int] = []
    for ids in written:
        text = shown.more(ids).text
        if text:
            yield text
    answer = reader.answer(ids, None)
    text = shown.rest(answer).text
    if text:
        yield text
    return answer


def beam_search_steps(
    model: VisionLanguageNetwork, prompt: Example, decoding: Decoding, fetch: Fetch
) -> Generator[None, None, list[Answer]]:
    """Answers one prompt by a beam search; yields after each token, returns the answers.

    The arguments are those of `streamed`.
    """
    reader = reader_of(model, decoding)
    left = model.llm.layout == "causal"
    batch = collate([prompt], model.processor.spec, fetch=fetch, pad_left=left).to(model.device)
    picker = picker_of(model, prompt, decoding)
    with _in_thread(model, batch, decoding, picker, reader) as turns:
        for _ in turns.steps():
            yield
        beams, _ = turns.outcome()
    return [reader.answer(ids, None) for ids in beams]


def _written(steps: Iterator[torch.Tensor]) -> Iterator[list[list[int]]]:
    """The new ids of rows so far, by all of their ids, int64[R, n]."""
    begin: int | None = None
    for ids in steps:
        # They may begin with what is before the answer, such as a decoder's start token.
        begin = ids.shape[1] - 1 if begin is None else begin
        yield ids[:, begin:].tolist()


Generated = tuple[list[list[int]], TokenLogprobs | None]
"""What `generated` returns."""


class _Turns:
    """A stopping criterion of transformers that makes its thread wait for a turn at each token."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[torch.Tensor | Generated | BaseException]
        self._events = queue.SimpleQueue()
        self._turn = threading.Semaphore(0)
        self._closed = False
        self._outcome: Generated | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Waits for a turn; ends all rows once nobody reads the answer any more."""
        if not self._closed:
            self._events.put(input_ids)
            self._turn.acquire()
        return torch.full((len(input_ids),), self._closed, device=input_ids.device)

    def end(self, event: Generated | BaseException) -> None:
        """Notes what the thread ended with."""
        self._events.put(event)

    def steps(self) -> Iterator[torch.Tensor]:
        """Gives turns; yields the ids int64[R, n] after each token. Raises the thread's error."""
        while isinstance(event := self._events.get(), torch.Tensor):
            yield event
            self._turn.release()
        if isinstance(event, BaseException):
            raise event
        self._outcome = event

    def outcome(self) -> Generated:
        """The outcome of `generated`; there after the last step."""
        assert self._outcome is not None
        return self._outcome

    def close(self) -> None:
        """Lets the thread end at its next token."""
        self._closed = True
        self._turn.release()


@contextmanager
def _in_thread(
    model: VisionLanguageNetwork,
    batch: Batch,
    decoding: Decoding,
    picker: Picker,
    reader: AnswerReader,
) -> Iterator[_Turns]:
    """Generates by transformers in another thread, a token a turn, to the end of the block."""
    turns = _Turns()

    def generate() -> None:
        try:
            turns.end(generated(model, batch, decoding, picker, reader, turns))
        except BaseException as error:  # raised where the steps are taken
            turns.end(error)

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    try:
        yield turns
    finally:
        turns.close()
        thread.join()
