"""The decode loop: branches of prefilled rows grow token by token until their answers end.

Between two looks of the host every step is work of the device alone.

Shapes: B rows, K branches of a row, N new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from vlm_tune.generation.logprobs import TokenLogprobs
from vlm_tune.generation.picking import Picker
from vlm_tune.model.language.row_buffers import Branches

SPARED = 0.8
"""Share of unfinished branches below which the finished ones are dropped from the batch."""

LOOK_EVERY = 16
"""Decode steps on a GPU after which the host looks which answers have ended.

Each look waits for the device, about as long as a step takes to be launched; the steps that are
run in vain after the last answer's end are eight on average.
"""

Ends = Callable[[list[list[list[int]]]], list[list[bool]]]
"""A function of ids [B, K, n] written so far: whether each answer has ended."""


class Continuation:
    """Answers to B x K prefilled branches while they grow.

    Attributes:
        ids: The answers int64[B, K, N], filled up with the first stop id.
        logprobs: The log-probabilities [B, K, N] of the ids, if they are wanted.
    """

    def __init__(
        self,
        branches: Branches,
        picker: Picker,
        stop_ids: Sequence[int],
        new_tokens: int,
        ends: Ends | None = None,
    ) -> None:
        """Begins with no token.

        Args:
            branches: The branches after their prefill.
            picker: Chooses the tokens.
            stop_ids: Ids that end an answer.
            new_tokens: N, the most new tokens.
            ends: Looks for other ends than stop ids.
        """
        device = branches.hidden.device
        shape = branches.hidden.shape[:2]
        self.branches = branches
        self.picker = picker
        self.new_tokens = new_tokens
        self.ends = ends
        self.stops = torch.tensor(stop_ids, device=device)
        self.ids = self.stops[0].repeat(*shape, new_tokens)
        self.logprobs: TokenLogprobs | None = None
        if picker.decoding.logprobs:
            count = picker.decoding.top_logprobs
            self.logprobs = TokenLogprobs.zeros((*shape, new_tokens), count, device)
        # Of the branches that are still continued: their places in a row, and whether they ended.
        self.places = torch.arange(shape[1], device=device).expand(shape)
        self.ended = torch.zeros(shape, dtype=torch.bool, device=device)

    @torch.inference_mode()
    def run(self, look_every: int) -> Iterator[int]:
        """Yields the number of tokens that are written whenever the host looks.

        It looks after each `look_every` steps, and at the end.
        """
        hidden = self.branches.hidden
        for count in range(1, self.new_tokens + 1):
            self._write(count - 1, *self.picker.of_hidden(hidden, self._written(count - 1)))
            last = count == self.new_tokens
            if last or count % look_every == 0:
                unfinished = self._unfinished(count)
                yield count
                if unfinished == 0 or last:
                    return
                self._drop_ended(unfinished)
            hidden = self.branches.step(self.tokens)

    def _written(self, count: int) -> torch.Tensor:
        """The first ids [B, K', count] of the branches that are still continued."""
        places = self.places[..., None].expand(-1, -1, count)
        return self.ids[..., :count].gather(1, places)

    def _write(self, step: int, tokens: torch.Tensor, logprobs: TokenLogprobs | None) -> None:
        self.tokens = tokens
        answers = torch.where(self.ended, self.stops[0], tokens)
        self.ids[..., step].scatter_(1, self.places, answers)
        if self.logprobs is not None and logprobs is not None:
            self.logprobs.write(step, self.places, logprobs)
        self.ended = self.ended | (tokens[..., None] == self.stops).any(-1)

    def _unfinished(self, count: int) -> int:
        """The largest number of unfinished branches of a row, for which the host waits."""
        if self.ends is not None:
            ended = torch.tensor(self.ends(self.ids[..., :count].tolist()))
            self.ended = self.ended | ended.to(self.ended.device).gather(1, self.places)
        return int((~self.ended).sum(1).max())

    def _drop_ended(self, unfinished: int) -> None:
        if unfinished >= SPARED * self.ended.shape[1]:
            return
        order = self.ended.int().argsort(dim=1, stable=True)[:, :unfinished]
        self.branches.select(order)
        self.picker.select(order)
        self.places, self.tokens, self.ended = (
            each.gather(1, order) for each in (self.places, self.tokens, self.ended)
        )


def look_interval(device: torch.device) -> int:
    """Decode steps between two looks of the host: on a CPU a look costs nothing."""
    return 1 if device.type == "cpu" else LOOK_EVERY
