"""Answers as they are written: an iterator of pieces of text."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch

from vlm_tune.data.batching.collate import Fetch, collate
from vlm_tune.data.packing import Tree
from vlm_tune.data.types import Example
from vlm_tune.generation.answering import continuation_of, continues
from vlm_tune.generation.answers import Answer, AnswerReader
from vlm_tune.generation.constraints import json_constraint
from vlm_tune.generation.continuing import Continuation
from vlm_tune.generation.generating import generated
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
    row = Tree(prompt, (0,), (len(prompt.input_ids) - 1,))
    reader = AnswerReader(model.processor, decoding.stop_strings)
    picker = picker_of(model, prompt, decoding)
    continued = continues(model, decoding)
    left = model.llm.layout == "causal" and not continued
    batch = collate([prompt], model.processor.spec, fetch=fetch, pad_left=left).to(model.device)
    if continued:
        continuation = continuation_of(model, batch, [row], decoding, picker, reader)
        return (yield from pieces(continuation, reader))
    if decoding.num_beams > 1:
        ids, _ = generated(model, batch, decoding, picker, reader)
        answer = reader.answer(ids[0], None)
        yield answer.text
        return answer
    return (yield from _in_thread(model, batch, decoding, picker, reader))


def picker_of(model: VisionLanguageNetwork, prompt: Example, decoding: Decoding) -> Picker:
    """The picker of one prompt's answer."""
    numbers = draws(decoding, 0)
    ids = penalised_ids(model.llm, prompt, decoding)
    if numbers is not None:
        numbers = numbers[None, None]
    constraint = json_constraint(model.processor, decoding, model.llm.vocabulary)
    return Picker(model.llm, decoding, [[ids]], numbers, model.device, constraint)


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
        self._shown = ""

    def more(self, ids: Sequence[int]) -> str:
        """The text to add for the ids so far; empty if there is none."""
        text = self._reader.shown(ids)
        if len(text) <= len(self._shown) or not text.startswith(self._shown):
            return ""
        more = text[len(self._shown) :]
        self._shown = text
        return more

    def rest(self, answer: Answer) -> str:
        """The text to add at the answer's end."""
        return answer.text[len(self._shown) :]


def _pieces(written: Iterator[list[int]], reader: AnswerReader) -> Pieces:
    shown = ShownText(reader)
    ids: list[int] = []
    for ids in written:
        text = shown.more(ids)
        if text:
            yield text
    answer = reader.answer(ids, None)
    text = shown.rest(answer)
    if text:
        yield text
    return answer


def _in_thread(
    model: VisionLanguageNetwork,
    batch: Any,
    decoding: Decoding,
    picker: Picker,
    reader: AnswerReader,
) -> Pieces:
    """The pieces of an answer that transformers generates, in another thread.

    When the iterator is closed the thread stops at its next token.
    """
    written: queue.Queue[Any] = queue.Queue()
    closed = threading.Event()

    def generate() -> None:
        try:
            ids, logprobs = generated(
                model, batch, decoding, picker, reader, _Streamer(written), _Closed(closed)
            )
            written.put(reader.answer(ids[0], None if logprobs is None else logprobs[0]))
        except BaseException as error:  # raised where the pieces are read
            written.put(error)

    def ids_so_far() -> Iterator[list[int]]:
        ids: list[int] = []
        while isinstance(event := written.get(), list):
            ids = [*ids, *event]
            yield ids
        if isinstance(event, BaseException):
            raise event
        outcome.append(event)

    outcome: list[Answer] = []
    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    try:
        yield from _pieces(ids_so_far(), reader)
    finally:
        closed.set()
        thread.join()
    return outcome[0]


class _Streamer:
    """A streamer of transformers that puts new ids into a queue, as lists."""

    def __init__(self, written: queue.Queue[Any]) -> None:
        self.written = written
        self.begun = False

    def put(self, value: torch.Tensor) -> None:
        """Takes the next ids. The first ones are those before the answer, if there are any."""
        if self.begun:
            self.written.put(value.flatten().tolist())
        self.begun = True

    def end(self) -> None:
        """Is called after the last id."""


class _Closed:
    """A stopping criterion of transformers: whether nobody reads the answer any more."""

    def __init__(self, closed: threading.Event) -> None:
        self.closed = closed

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.closed.is_set(), device=input_ids.device)
