"""An answer, and how it is read from generated ids: where it ends, and its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from vlm_tune.data.chat.processor import Processor
from vlm_tune.generation.logprobs import TokenLogprobs

DECODED = 64
"""The number of new ids after which the cached text of a growing answer is renewed."""
CONTEXT = 8
"""The number of cached ids that are decoded again with those that follow."""


@dataclass(frozen=True)
class Answer:
    """An answer of a model.

    Attributes:
        text: The text, without outer white space, and without the reasoning before it.
        finish_reason: "stop" if it ended with a stop token or a stop string, "length" if
            `max_new_tokens` or the model's positions ended it.
        ids: The generated ids, without a stop token.
        logprobs: The log-probabilities of the ids under the model, before any temperature or
            penalty, if they were asked for. For an answer by `choices` they are those of the
            choice's tokens, its end included.
        top_logprobs: With `top_logprobs` above 0, for each id the log-probabilities of the
            likeliest tokens in its place, by id, the likeliest first.
        alternatives: The further answers, of `num_return_sequences` above 1.
        probabilities: Of `choices`: the probability of each choice, which add up to 1.
        stop_id: The stop token that ended it, if one did.
        reasoning: The reasoning before the answer, of a model whose chat format has some; None
            without any. Where `max_new_tokens` ended it, the text is empty.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[dict[int, float], ...] | None = None
    alternatives: tuple[Answer, ...] = ()
    probabilities: dict[str, float] | None = None
    stop_id: int | None = None
    reasoning: str | None = None


class Written(NamedTuple):
    """Text of an answer while it is written, and of the reasoning before it."""

    text: str = ""
    reasoning: str = ""


def up_to_stop(ids: Sequence[int], stops: Sequence[int]) -> list[int]:
    """The ids before the first stop id."""
    places = [ids.index(stop) for stop in stops if stop in ids]
    return list(ids[: min(places, default=len(ids))])


def _unfinished(run: bytes) -> int:
    """The number of last bytes that begin a character of UTF-8 and do not end it."""
    try:
        run.decode()
    except UnicodeDecodeError as error:
        return len(run) - error.start if error.reason == "unexpected end of data" else 0
    return 0


def _without_begun(text: str, ends: Sequence[str]) -> str:
    """A text without what may be the beginning of one of the texts that end it."""
    sizes = (size for end in ends for size in range(1, len(end)) if text.endswith(end[:size]))
    return text[: len(text) - max(sizes, default=0)]


class AnswerReader:
    """Reads answers from generated ids: stop ids end them, and stop strings cut them."""

    def __init__(self, processor: Processor, stop_strings: Sequence[str]) -> None:
        self.processor = processor
        self.stop_ids = processor.stop_ids
        self.stop_strings = stop_strings
        self._reasoning = processor.template.reasoning
        self._opened = processor.template.opens_reasoning
        # The cache: decoded ids and their text. A pair, so that threads replace both at once.
        self._decoded: tuple[list[int], str] = ([], "")

    def answer(self, ids: Sequence[int], logprobs: TokenLogprobs | None) -> Answer:
        """The answer of new ids, which may continue after its end.

        `logprobs` are those of the ids [N], and as many or more.
        """
        answer_ids = up_to_stop(ids, self.stop_ids)
        ended = len(answer_ids) < len(ids)
        stop_id = ids[len(answer_ids)] if ended else None
        if self.holds_stop(answer_ids):
            ended = True
            stop_id = None
            # Where the host does not look after each token, there are some after the stop string.
            while self.holds_stop(answer_ids[:-1]):
                answer_ids.pop()
        # Of an answer that was broken off inside a character, the bytes before it are text.
        broken = 0 if ended else _unfinished(self.processor.encoder.trailing_bytes(answer_ids))
        whole = self.processor.raw_text(answer_ids[: len(answer_ids) - broken])
        reasoning, text = self._parts(whole)
        if text is None:
            # What may have become an opening mark was none, unless it is a whole one.
            begun = self._reasoning and whole.lstrip().startswith(self._reasoning.opening)
            text = "" if reasoning or begun else whole
        count = len(answer_ids)
        return Answer(
            self._cut(text).strip(),
            "stop" if ended else "length",
            tuple(answer_ids),
            None if logprobs is None else tuple(logprobs.chosen[:count].tolist()),
            None if logprobs is None else logprobs.likeliest(count),
            stop_id=stop_id,
            reasoning=reasoning.strip() or None,
        )

    def _parts(self, text: str) -> tuple[str, str | None]:
        """The reasoning and the answer in a text; None for an answer that has not begun."""
        if self._reasoning is None:
            return "", text
        return self._reasoning.split(text, opened=self._opened)

    def holds_stop(self, ids: Sequence[int]) -> bool:
        """Whether the text of ids, up to the first stop id, holds a stop string.

        One in the reasoning before an answer does not count.
        """
        if not self.stop_strings:
            return False
        _, text = self._parts(self._raw_text(up_to_stop(ids, self.stop_ids)))
        return text is not None and any(stop in text for stop in self.stop_strings)

    def ends(self, ids: list[list[list[int]]]) -> list[list[bool]]:
        """For ids [B, K, n]: whether each answer holds a stop string."""
        return [[self.holds_stop(branch) for branch in row] for row in ids]

    def shown(self, ids: Sequence[int]) -> Written:
        """The beginning of an answer's text and reasoning that later ids do not change.

        Held back are a character whose bytes have not all come, a run of byte tokens, and what may
        begin a stop string, or in reasoning the mark that ends it.
        """
        ids = up_to_stop(ids, self.stop_ids)
        run = len(self.processor.encoder.trailing_bytes(ids))
        reasoning, text = self._parts(self._raw_text(ids[: len(ids) - run]).rstrip("\ufffd"))
        if text is None:
            closing = "" if self._reasoning is None else self._reasoning.closing
            return Written("", _without_begun(reasoning, [closing]).strip())
        whole = self._cut(text)
        if whole == text:
            whole = _without_begun(text, self.stop_strings)
        return Written(whole.strip(), reasoning.strip())

    def _raw_text(self, ids: list[int]) -> str:
        """As `Processor.raw_text`; of an answer that grows only the last ids are decoded again."""
        decode = self.processor.raw_text
        before, text = self._decoded
        count = len(before)
        if not count or ids[:count] != before:
            count = 0
            text = decode(ids)
        else:
            context = before[-CONTEXT:]
            begin = decode(context)
            longer = decode([*context, *ids[count:]])
            # Otherwise new ids change the text of those before them, or begin a text here.
            continued = begin.strip() and longer.startswith(begin)
            text = text + longer[len(begin) :] if continued else decode(ids)
        if len(ids) - count >= DECODED and not self.processor.encoder.trailing_bytes(ids):
            self._decoded = (ids, text)
        return text

    def _cut(self, text: str) -> str:
        """The text before the first stop string."""
        places = [text.find(stop) for stop in self.stop_strings]
        return text[: min((place for place in places if place >= 0), default=len(text))]
