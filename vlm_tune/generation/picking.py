"""Chooses the next tokens of answers from their logits: the likeliest ones, or drawn ones.

The settings are applied by transformers' logits processors. A draw takes one number from a stream
that belongs to the prompt, so that its answer does not depend on the batch it is in.

Shapes: B rows, K branches of a row, N new tokens, P tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vlm_tune.data.types import Example
from vlm_tune.model.language.base import LanguageModel
from vlm_tune.model.language.decoding import Decoding, largest


def draws(decoding: Decoding, sample: int) -> np.ndarray | None:
    """Numbers float64[N] from 0 to 1 by which an answer's tokens are drawn; None for no draws.

    `sample` counts a prompt's answers. The numbers follow from it and from the seed alone.
    """
    if not decoding.samples:
        return None
    start = None if decoding.seed is None else [decoding.seed, sample]
    return np.random.default_rng(start).random(decoding.max_new_tokens)


def penalised_ids(llm: LanguageModel, prompt: Example) -> list[int]:
    """The ids of a prompt whose repetition is penalised: those of a decoder's text."""
    if llm.layout == "seq2seq":
        return []
    return prompt.input_ids[~prompt.image_mask].tolist()


class Picker:
    """Chooses the next tokens of B x K branches, and notes their log-probabilities."""

    def __init__(
        self,
        llm: LanguageModel,
        decoding: Decoding,
        prompts: Sequence[Sequence[Sequence[int]]],
        numbers: np.ndarray | None,
        device: torch.device,
    ) -> None:
        """Makes a picker.

        Args:
            llm: The language model.
            decoding: The settings.
            prompts: For each row and branch the ids whose repetition is penalised; they are read
                where there is a penalty.
            numbers: The branches' `draws` [B, K, N].
            device: The device of the logits.
        """
        from transformers import (
            LogitsProcessorList,
            MinPLogitsWarper,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        self.llm = llm
        self.decoding = decoding
        self.numbers = None if numbers is None else torch.from_numpy(numbers).to(device)
        self.prompts: torch.Tensor | None = None
        if decoding.repetition_penalty != 1:
            self.prompts = _padded(prompts).to(device)
        self.penalty = RepetitionPenaltyLogitsProcessor(float(decoding.repetition_penalty))
        self.warpers = LogitsProcessorList()
        if decoding.samples:
            self.warpers.append(TemperatureLogitsWarper(float(decoding.temperature)))
        if decoding.top_k:
            self.warpers.append(TopKLogitsWarper(decoding.top_k))
        if decoding.top_p < 1:
            self.warpers.append(TopPLogitsWarper(float(decoding.top_p)))
        if decoding.min_p:
            self.warpers.append(MinPLogitsWarper(float(decoding.min_p)))

    def of_hidden(
        self, hidden: torch.Tensor, written: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Chooses by hidden states [B, K, E] of the branches' last tokens.

        `written` int64[B, K, n] are the answers so far.

        Returns:
            Tokens int64[B, K], and if they are wanted their log-probabilities fp32[B, K].
        """
        llm = self.llm
        if self.decoding.plain and llm.rule is not None and llm.rule.rising:
            # Neither the fp32 cast nor a cap changes the argmax of the head's outputs.
            return largest(llm.head(hidden)), None
        logits = llm.logits(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
        return self.of_logits(logits, written)

    def of_logits(
        self, logits: torch.Tensor, written: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `of_hidden`, by logits fp32[B, K, V]."""
        scores = logits.flatten(0, 1)
        if self.prompts is not None:
            ids = torch.cat([self.prompts, written], -1).flatten(0, 1)
            scores = self.penalty(ids, scores) if ids.shape[-1] else scores
        if self.numbers is None:
            tokens = largest(scores)
        else:
            number = self.numbers[..., written.shape[-1]].flatten()
            tokens = _drawn(self.warpers(written.flatten(0, 1), scores), number)
        tokens = tokens.unflatten(0, logits.shape[:2])
        if not self.decoding.logprobs:
            return tokens, None
        return tokens, logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]

    def select(self, places: torch.Tensor) -> None:
        """Drops all branches but those at `places` int64[B, K']."""
        rows = torch.arange(len(places), device=places.device)[:, None]
        if self.numbers is not None:
            self.numbers = self.numbers[rows, places]
        if self.prompts is not None:
            self.prompts = self.prompts[rows, places]


def _padded(prompts: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
    """The ids as a tensor [B, K, P].

    A shorter prompt's last id is repeated, which changes nothing: an id is penalised once.
    """
    length = max(len(ids) for row in prompts for ids in row)
    filled = [[[*ids, *ids[-1:] * (length - len(ids))] for ids in row] for row in prompts]
    return torch.tensor(filled, dtype=torch.int64)


def _drawn(scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Tokens int64[R] at which the summed probabilities of scores [R, V] exceed `numbers` [R]."""
    sums = scores.softmax(-1).double().cumsum(-1)
    wanted = numbers[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, wanted, right=True)[:, 0].clamp(max=scores.shape[-1] - 1)


def picking_processor(picker: Picker, logprobs: list[torch.Tensor]) -> Any:
    """A logits processor of transformers' `generate` that leaves a picker's tokens alone.

    The tokens' log-probabilities are appended to `logprobs`, one tensor [B] a step. Each row has
    one branch.
    """
    from transformers import LogitsProcessor

    class Picking(LogitsProcessor):
        def __init__(self) -> None:
            self.before: int | None = None

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            # The ids begin with what is before the answer, such as a decoder's start token.
            if self.before is None:
                self.before = input_ids.shape[1]
            written = input_ids[:, None, self.before :]
            tokens, of_tokens = picker.of_logits(scores.float()[:, None], written)
            if of_tokens is not None:
                logprobs.append(of_tokens[:, 0])
            return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)

    return Picking()


def penalising_processor(picker: Picker, beams: int) -> Any:
    """A logits processor of transformers' `generate` for a picker's penalty, in a beam search."""
    from transformers import LogitsProcessor

    assert picker.prompts is not None
    prompts = picker.prompts[:, 0].repeat_interleave(beams, 0)

    class Penalising(LogitsProcessor):
        def __init__(self) -> None:
            self.before: int | None = None

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if self.before is None:
                self.before = input_ids.shape[1]
            ids = torch.cat([prompts, input_ids[:, self.before :]], 1)
            return picker.penalty(ids, scores) if ids.shape[1] else scores

    return Penalising()
