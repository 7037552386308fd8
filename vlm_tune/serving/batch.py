"""Answers to many jobs of one model, which are generated together: continuous batching.

A step prefills prompts that joined, writes a token of every answer, and drops those that ended.

transformers has continuous batching for text: prompts of token ids, decoders alone, a cache of
pages for its attention functions. Here prompts have images, as embeddings, T5 takes part, and an
image that many ask about is read once. So the rows are `model.language.row_buffers`; what chooses
tokens and reads text is that of offline answers, and so are the answers.

Shapes: R answers, B prompts that join, E width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from vlm_tune.data.batching.collate import collate
from vlm_tune.data.types import Example
from vlm_tune.generation.answering import shares_prefix
from vlm_tune.generation.chat import VisionLanguageModel
from vlm_tune.generation.chat_session import prompt_rest
from vlm_tune.model.acceleration.onednn_products import OneDnnProducts
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.language.row_buffers import Prefix
from vlm_tune.serving.features import Features, features_of
from vlm_tune.serving.jobs import Failed
from vlm_tune.serving.prefixes import MOST_PREFIXES, Prefixes, longest_prefix
from vlm_tune.serving.request import Request
from vlm_tune.serving.writing import NextTokens, Writing

PREFILL = 1024
"""Most tokens of prompts that are prefilled in a step, so that other answers do not wait long."""

PADDING = 1.25
"""The length of the longest prompt in a prefill, as a multiple of the shortest one's."""

TOKENS = 1 << 16
"""Most tokens of the rows, of their number times the longest one's length.

Their buffers have room for up to four times as many.
"""


def batching_reason(model: VisionLanguageModel) -> str | None:
    """The reason why a model's jobs are answered one by one; None if they are batched."""
    if not model.connector.fills_slots:
        return "its connector attends from the LLM's layers"
    return model.llm.unbatched


@dataclass(frozen=True)
class _Joining:
    """A prompt to prefill: what follows the remembered prefix that it begins with."""

    request: Request
    prefix: Prefix | None
    rest: Example

    def __len__(self) -> int:
        return len(self.rest.input_ids)


class Batch:
    """A lane of jobs of one model that are answered together.

    Attributes:
        features: The tower's features of images that came lately.
        prefixes: Prefixes of prompts that came lately.
    """

    def __init__(
        self, model: VisionLanguageModel, size: int, prefix_bytes: int, features: Features
    ) -> None:
        """Begins without jobs.

        Args:
            model: The model; `batching_reason` has none against it.
            size: The maximum number of answers generated at a time.
            prefix_bytes: The most memory of the prefixes.
            features: The tower's features of images that came lately.
        """
        self.features = features
        self.prefixes = Prefixes(prefix_bytes, MOST_PREFIXES)
        self._model = model
        self._size = size
        self._rows = model.llm.rows()
        self._next_tokens = NextTokens(model.llm, model.device)
        self._reuses = self._rows.takes_prefixes and shares_prefix(model, Decoding())
        self._joining: list[Request] = []
        self._writings: list[Writing] = []
        # The hidden states [R, E] of the answers' last tokens.
        self._hidden: torch.Tensor | None = None

    @property
    def running(self) -> int:
        """The number of jobs here."""
        return len({*self._joining, *(each.request for each in self._writings)})

    def has_room(self, request: Request) -> bool:
        """Whether a job can join those that are here; one by itself always can."""
        requests = [*self._joining, *(each.request for each in self._writings)]
        if not requests:
            return True
        answers = len(self._writings) + sum(each.job.answers for each in (*self._joining, request))
        longest = max(_length(each) for each in (*requests, request))
        waiting = sum(len(each.prompt.input_ids) for each in self._joining)
        return answers <= self._size and answers * longest <= TOKENS and waiting < PREFILL

    def add(self, request: Request) -> None:
        """Takes a job."""
        self._joining.append(request)

    @torch.inference_mode()
    def step(self) -> None:
        """Prefills the prompts that came, and writes a token of every answer."""
        with self._model.evaluating(), OneDnnProducts():
            self._join()
            if not self._writings:
                return
            try:
                self._write()
            except Exception as error:  # whatever it is, the server continues
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Ends all jobs that are written with an error."""
        for writing in self._writings:
            writing.request.emit(Failed(error))
        self._writings = []
        self._hidden = None
        self._rows = self._model.llm.rows()

    def _write(self) -> None:
        self._drop([row for row, each in enumerate(self._writings) if each.request.ended])
        if self._hidden is None:
            return
        tokens, logprobs = self._next_tokens.of(self._hidden, self._writings)
        numbers = zip(tokens.tolist(), logprobs, strict=True)
        ended = [
            row
            for row, (writing, number) in enumerate(zip(self._writings, numbers, strict=True))
            if writing.write(*number)
        ]
        order = self._drop(ended)
        if order:
            self._hidden = self._rows.step(tokens[order])

    def _drop(self, rows: Sequence[int]) -> list[int]:
        """Drops answers; returns for those that stay the numbers that they had."""
        if not rows:
            return list(range(len(self._writings)))
        order = self._rows.drop(rows)
        self._writings = [self._writings[row] for row in order]
        self._hidden = self._hidden[order] if order and self._hidden is not None else None
        return order

    def _join(self) -> None:
        """Prefills the prompts that came.

        Of those that begin with one image of which no prefix is remembered, one goes first.
        """
        coming = [request for request in self._joining if not request.ended]
        first: list[Request] = []
        later: list[Request] = []
        images: set[object] = set()
        for request in coming:
            beginning = request.images.beginning
            shown = beginning.first(beginning.images_end)
            again = self._reuses and len(shown) and shown in images
            images.add(shown)
            (later if again else first).append(request)
        for requests in (first, later):
            for group in _alike([self._after_prefix(request) for request in requests]):
                self._prefill(group)
        self._joining = []

    def _after_prefix(self, request: Request) -> _Joining:
        prompt = request.prompt
        prefix = None
        if self._reuses:
            prefix = longest_prefix(self.prefixes, request.images.beginning)
        if prefix is None:
            return _Joining(request, None, prompt)
        tokens_per_image = self._model.processor.spec.tokens_per_image
        return _Joining(request, prefix, prompt_rest(prompt, prefix.length, tokens_per_image))

    def _prefill(self, group: Sequence[_Joining]) -> None:
        """Prefills prompts together; where that fails, one by one."""
        try:
            hidden = self._rows_joined(group)
        except Exception as error:  # of these jobs alone
            if len(group) == 1:
                group[0].request.emit(Failed(error))
            else:
                for joining in group:
                    self._prefill([joining])
            return
        first = len(self._writings)
        self._writings += [Writing(joining.request, 0) for joining in group]
        parts = [hidden] if self._hidden is None else [self._hidden, hidden]
        for place, joining in enumerate(group):
            self._remember(joining, first + place)
            others = joining.request.job.answers - 1
            if others:
                self._rows.repeat(first + place, others)
                self._writings += [Writing(joining.request, k + 1) for k in range(others)]
                parts.append(hidden[place].expand(others, -1))
        self._hidden = torch.cat(parts)

    def _rows_joined(self, group: Sequence[_Joining]) -> torch.Tensor:
        """The hidden states [B, E] of the prompts' last tokens."""
        model = self._model
        features = features_of(
            model,
            self.features,
            [(joining.request.images, media) for joining in group for media in joining.rest.media],
        )
        batch = collate(
            [joining.rest for joining in group],
            model.processor.spec,
            fetch=features.__getitem__,
            cached=True,
        ).to(model.device)
        lengths = [len(joining) for joining in group]
        prefixes = [joining.prefix for joining in group]
        blocks = model.llm.blocks(batch)
        return self._rows.join(model.embed(batch), lengths, prefixes, blocks)

    def _remember(self, joining: _Joining, row: int) -> None:
        """Remembers a row's tokens up to the end of its last image, if that is new."""
        beginning = joining.request.images.beginning
        end = beginning.images_end
        if self._reuses and end > (0 if joining.prefix is None else joining.prefix.length):
            self.prefixes.put(beginning.first(end), self._rows.prefix(row, end))


def _length(request: Request) -> int:
    """The most tokens of a prompt and its answer."""
    return len(request.prompt.input_ids) + request.job.decoding.max_new_tokens


def _alike(joining: Sequence[_Joining]) -> Iterator[list[_Joining]]:
    """Yields groups of prompts of like lengths, of which the longest comes last."""
    group: list[_Joining] = []
    for each in sorted(joining, key=len):
        if group and len(each) > PADDING * len(group[0]):
            yield group
            group = []
        group.append(each)
    if group:
        yield group
