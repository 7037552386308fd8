"""An answer that is written token by token, and how the tokens of many are chosen.

Shapes: R answers, E width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlm_tune.errors import VlmTuneError
from vlm_tune.generation.answering import reader_of
from vlm_tune.generation.answers import Written
from vlm_tune.generation.logprobs import TokenLogprobs
from vlm_tune.generation.picking import Picker, draws, penalised_ids
from vlm_tune.generation.streaming import ShownText
from vlm_tune.model.language.base import LanguageModel
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.serving.jobs import Failed, Finished, Piece, ScoredToken
from vlm_tune.serving.request import Request


class Writing:
    """An answer of a job while it is written.

    Attributes:
        request: The job.
        picker: Chooses the answer's tokens; None where each is the likeliest one.
        ids: The tokens so far.
    """

    def __init__(self, request: Request, number: int) -> None:
        """Begins without tokens; `number` is the answer's, from 0."""
        model = request.model
        prompt = request.prompt
        decoding = request.job.decoding
        self.request = request
        self.number = number
        self.ids: list[int] = []
        self.picker = None if decoding.plain else _picker(request, number)
        self._limit = model.llm.room(decoding, len(prompt.input_ids)).max_new_tokens
        self._reader = reader_of(model, decoding)
        self._stop_ids = frozenset(self._reader.stop_ids)
        self._shown = ShownText(self._reader)
        self._logprobs: list[TokenLogprobs] = []
        self._scored = 0

    def write(self, token: int, logprobs: TokenLogprobs | None) -> bool:
        """Adds a token, hands out new text, and returns whether the answer ended.

        The token's log-probabilities [1] are given if they are wanted.

        The job may have ended otherwise, such as by being cancelled.
        """
        if self.request.ended:
            return True
        self.ids.append(token)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        ended = (
            token in self._stop_ids
            or len(self.ids) == self._limit
            or self._reader.holds_stop(self.ids)
        )
        if not ended:
            self._emit(self._shown.more(self.ids), len(self.ids))
            return self.request.ended
        logprobs = TokenLogprobs.stacked(self._logprobs)[0] if self._logprobs else None
        answer = self._reader.answer(self.ids, logprobs)
        self._emit(self._shown.rest(answer), len(answer.ids))
        self.request.emit(Finished(self.number, answer, len(self.request.prompt.input_ids)))
        return True

    def _emit(self, written: Written, count: int) -> None:
        """Hands out new text, if any, with those of the first `count` tokens that none had."""
        if not any(written):
            return
        new = slice(self._scored, count)
        scored = map(_scored, self.ids[new], self._logprobs[new])
        self._scored = count
        self.request.emit(Piece(self.number, written.text, tuple(scored), written.reasoning))


def _scored(token: int, logprobs: TokenLogprobs) -> ScoredToken:
    (tops,) = logprobs.likeliest(1) or ({},)
    return ScoredToken(token, float(logprobs.chosen[0]), tops)


def _picker(request: Request, number: int) -> Picker:
    llm = request.model.llm
    decoding = request.job.decoding
    numbers = draws(decoding, number)
    return Picker(
        llm,
        decoding,
        [[penalised_ids(llm, request.prompt, decoding)]],
        None if numbers is None else numbers[None, None],
        request.model.device,
        request.constraint,
    )


class NextTokens:
    """Chooses the next tokens of many answers by their last hidden states."""

    def __init__(self, llm: LanguageModel, device: torch.device) -> None:
        self._llm = llm
        self._plain = Picker(llm, Decoding(), [], None, device)
        self._none = torch.zeros(1, 1, 0, dtype=torch.int64, device=device)

    def of(
        self, hidden: torch.Tensor, writings: Sequence[Writing]
    ) -> tuple[torch.Tensor, list[TokenLogprobs | None]]:
        """Tokens int64[R] by hidden states [R, E], and log-probabilities [1] that are wanted."""
        others = [row for row, writing in enumerate(writings) if writing.picker is not None]
        if not others:
            return self._likeliest(hidden), [None] * len(writings)
        tokens = hidden.new_empty(len(writings), dtype=torch.int64)
        plain = [row for row, writing in enumerate(writings) if writing.picker is None]
        if plain:
            tokens[plain] = self._likeliest(hidden[plain])
        logprobs: list[TokenLogprobs | None] = [None] * len(writings)
        logits = self._llm.logits(hidden[others])
        for place, row in enumerate(others):
            writing = writings[row]
            assert writing.picker is not None
            ids = torch.tensor([[writing.ids]], dtype=torch.int64, device=hidden.device)
            try:
                token, of_token = writing.picker.of_logits(logits[None, place : place + 1], ids)
            except VlmTuneError as error:  # of this job alone
                writing.request.emit(Failed(error))
                tokens[row] = 0
                continue
            tokens[row] = token[0, 0]
            logprobs[row] = None if of_token is None else of_token[0]
        return tokens, logprobs

    def _likeliest(self, hidden: torch.Tensor) -> torch.Tensor:
        written = self._none.expand(len(hidden), 1, 0)
        return self._plain.of_hidden(hidden[:, None], written)[0][:, 0]
