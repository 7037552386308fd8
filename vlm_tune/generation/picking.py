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
from torch.nn.functional import pad

from vlm_tune.data.types import Example
from vlm_tune.generation.constraints import JsonBranches, JsonConstraint
from vlm_tune.generation.logprobs import TokenLogprobs
from vlm_tune.model.language.base import LanguageModel
from vlm_tune.model.language.decoding import Decoding, largest

SUMMED = 512
"""Probabilities that are summed by one product, where torch has to be deterministic on a GPU."""
NOTHING = -1
"""What fills up the ids of a prompt that has none."""


def draws(decoding: Decoding, sample: int, seed: int | None = None) -> np.ndarray | None:
    """Numbers float64[N] from 0 to 1 by which an answer's tokens are drawn; None for no draws.

    `sample` counts a prompt's answers. The numbers follow from it and from the seed alone, which is
    that of the decoding by default.
    """
    if not decoding.samples:
        return None
    seed = decoding.seed if seed is None else seed
    start = None if seed is None else [seed, sample]
    return np.random.default_rng(start).random(decoding.max_new_tokens)


def penalised_ids(llm: LanguageModel, prompt: Example, decoding: Decoding) -> list[int]:
    """The ids of a prompt whose repetition is penalised: those of a decoder's text.

    The list is empty where there is no penalty.
    """
    if llm.layout == "seq2seq" or decoding.repetition_penalty == 1:
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
        constraint: JsonConstraint | None = None,
    ) -> None:
        """Makes a picker.

        Args:
            llm: The language model.
            decoding: The settings.
            prompts: For each row and branch the `penalised_ids`.
            numbers: The branches' `draws` [B, K, N].
            device: The device of the logits.
            constraint: The `json_constraint` of the settings.
        """
        from transformers import (
            LogitsProcessorList,
            MinPLogitsWarper,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        assert (constraint is None) == (decoding.json_schema is None)
        self.llm = llm
        self.decoding = decoding
        self.constraint = constraint
        self.answers: JsonBranches | None = None
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
    ) -> tuple[torch.Tensor, TokenLogprobs | None]:
        """Chooses by hidden states [B, K, E] of the branches' last tokens.

        `written` int64[B, K, n] are the answers so far.

        Returns:
            Tokens int64[B, K], and if they are wanted their log-probabilities [B, K].
        """
        llm = self.llm
        if self.decoding.plain and llm.rule is not None and llm.rule.rising:
            # Neither the fp32 cast nor a cap changes the argmax of the head's outputs.
            return largest(llm.head(hidden)), None
        logits = llm.logits(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
        return self.of_logits(logits, written)

    def of_logits(
        self, logits: torch.Tensor, written: torch.Tensor
    ) -> tuple[torch.Tensor, TokenLogprobs | None]:
        """As `of_hidden`, by logits fp32[B, K, V]."""
        scores = self.penalised(logits.flatten(0, 1), written.flatten(0, 1))
        if self.constraint is not None:
            if self.answers is None:
                self.answers = JsonBranches(self.constraint, *logits.shape[:2])
            scores = self.answers.masked(scores, written)
        if self.numbers is None:
            tokens = largest(scores)
        else:
            ids: Any = written.flatten(0, 1)
            number = self.numbers[..., written.shape[-1]].flatten()
            tokens = _drawn(self.warpers(ids, scores), number)
        tokens = tokens.unflatten(0, logits.shape[:2])
        if not self.decoding.logprobs:
            return tokens, None
        return tokens, TokenLogprobs.of(logits, tokens, self.decoding.top_logprobs)

    def penalised(self, scores: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        """Scores [R, V] after the penalty for ids in the prompts and in answers int64[R, n].

        R is B x K, or in a beam search, which has one branch a row, a multiple of B.
        """
        if self.prompts is None:
            return scores
        prompts = self.prompts.flatten(0, 1)
        prompts = prompts.repeat_interleave(len(scores) // len(prompts), 0)
        ids: Any = torch.cat([prompts, written], -1)
        if not ids.shape[-1]:
            return scores
        size = scores.shape[-1]
        # The ids that fill up a prompt without any are those of a column that is dropped again.
        ids = ids.where(ids != NOTHING, size)
        return self.penalty(ids, pad(scores, (0, 1)))[..., :size]

    def select(self, places: torch.Tensor) -> None:
        """Drops all branches but those at `places` int64[B, K']."""
        rows = torch.arange(len(places), device=places.device)[:, None]
        if self.numbers is not None:
            self.numbers = self.numbers[rows, places]
        if self.prompts is not None:
            self.prompts = self.prompts[rows, places]
        if self.answers is not None:
            self.answers.select(places)


def _padded(prompts: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
    """The ids as a tensor [B, K, P].

    A shorter prompt's last id is repeated, which changes nothing: an id is penalised once. A prompt
    without text has `NOTHING`.
    """
    length = max(len(ids) for row in prompts for ids in row)
    filled = [
        [[*ids, *[ids[-1] if ids else NOTHING] * (length - len(ids))] for ids in row]
        for row in prompts
    ]
    return torch.tensor(filled, dtype=torch.int64)


def _drawn(scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Tokens int64[R] at which the summed probabilities of scores [R, V] exceed `numbers` [R]."""
    sums = _running_sums(scores.softmax(-1).double())
    wanted = numbers[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, wanted, right=True)[:, 0].clamp(max=scores.shape[-1] - 1)


def _running_sums(shares: torch.Tensor) -> torch.Tensor:
    """The sums of shares float64[R, V] up to each of them, and maybe the whole sum again behind.

    torch's own on a GPU has no deterministic form. Where that is demanded, they are products with
    triangles of ones, of blocks and of the blocks' sums.
    """
    if shares.device.type == "cpu" or not torch.are_deterministic_algorithms_enabled():
        return shares.cumsum(-1)
    blocks = pad(shares, (0, -shares.shape[-1] % SUMMED)).unflatten(-1, (-1, SUMMED))
    within = blocks @ shares.new_ones(SUMMED, SUMMED).triu()
    count = blocks.shape[-2]
    before = within[..., -1] @ shares.new_ones(count, count).triu(1)
    return (within + before[..., None]).flatten(-2)
