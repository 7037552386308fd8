"""Log-probabilities of generated tokens, and of the likeliest tokens in their places.

Shapes: V vocabulary, T the number of likeliest tokens, which may be 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities under the model as it is, for tokens of any shape [...].

    Attributes:
        chosen: Of the tokens, fp32[...].
        top: Of the likeliest tokens in each place, the likeliest first, fp32[..., T].
        top_ids: Those tokens, int64[..., T].
    """

    chosen: torch.Tensor
    top: torch.Tensor
    top_ids: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, tokens: torch.Tensor, count: int) -> TokenLogprobs:
        """Those of `tokens` int64[...] and of the `count` likeliest, by logits fp32[..., V]."""
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(-1, tokens[..., None])[..., 0]
        return cls(chosen, *logprobs.topk(min(count, logits.shape[-1]), -1))

    @classmethod
    def zeros(cls, shape: Sequence[int], count: int, device: torch.device) -> TokenLogprobs:
        """Room for those of tokens of a shape, with `count` likeliest ones each."""
        return cls(
            torch.zeros(*shape, device=device),
            torch.zeros(*shape, count, device=device),
            torch.zeros(*shape, count, dtype=torch.int64, device=device),
        )

    @classmethod
    def stacked(cls, parts: Sequence[TokenLogprobs]) -> TokenLogprobs:
        """Those of several steps [B], as [B, steps]."""
        return cls(
            torch.stack([part.chosen for part in parts], 1),
            torch.stack([part.top for part in parts], 1),
            torch.stack([part.top_ids for part in parts], 1),
        )

    def __getitem__(self, place: Any) -> TokenLogprobs:
        """Those of the tokens at a place."""
        return TokenLogprobs(self.chosen[place], self.top[place], self.top_ids[place])

    def cpu(self) -> TokenLogprobs:
        """Those on the CPU, for which the host waits once."""
        return TokenLogprobs(self.chosen.cpu(), self.top.cpu(), self.top_ids.cpu())

    def write(self, step: int, places: torch.Tensor, logprobs: TokenLogprobs) -> None:
        """Writes those of a step's tokens [B, K'] to their branches' places int64[B, K'].

        The object is of shape [B, K, N]: N steps of K branches in each row.
        """
        self.chosen[..., step].scatter_(1, places, logprobs.chosen)
        wide = places[..., None].expand_as(logprobs.top)
        self.top[..., step, :].scatter_(1, wide, logprobs.top)
        self.top_ids[..., step, :].scatter_(1, wide, logprobs.top_ids)

    def likeliest(self, count: int) -> tuple[dict[int, float], ...] | None:
        """The likeliest tokens of the first `count` places, by id; None if T is 0.

        The object is of shape [N].
        """
        if not self.top.shape[-1]:
            return None
        rows = zip(self.top_ids[:count].tolist(), self.top[:count].tolist(), strict=True)
        return tuple(dict(zip(ids, values, strict=True)) for ids, values in rows)
