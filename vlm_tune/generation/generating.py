"""Answers by transformers' `generate`: beam search, and models that are not continued here.

Shapes: B rows, N new tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from vlm_tune.data.batch import Batch
from vlm_tune.generation.answers import AnswerReader
from vlm_tune.generation.logprobs import TokenLogprobs
from vlm_tune.generation.picking import Picker
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.vlm import VisionLanguageNetwork


@torch.inference_mode()
def generated(
    model: VisionLanguageNetwork,
    batch: Batch,
    decoding: Decoding,
    picker: Picker,
    reader: AnswerReader,
    criterion: Any = None,
) -> tuple[list[list[int]], TokenLogprobs | None]:
    """Generates the new ids of rows, and if they are wanted the ids' log-probabilities [B, N].

    Args:
        model: the model.
        batch: rows of one prompt each, for a decoder padded on the left.
        decoding: how answers are generated.
        picker: chooses the rows' tokens.
        reader: reads their texts.
        criterion: a further stopping criterion of transformers.

    Returns:
        The ids, which may continue after their end: of a beam search those of all beams to return,
        row by row.
    """
    from transformers import LogitsProcessorList, StoppingCriteriaList

    processor = None
    if decoding.num_beams > 1:
        processor = _Penalising(picker) if decoding.repetition_penalty != 1 else None
    elif not decoding.plain:
        processor = _Picking(picker)
    stops = [criterion, _StopStrings(reader) if decoding.stop_strings else None]
    ids = model.llm.generate(
        model.embed(batch),
        batch,
        decoding,
        model.processor.spec.pad_id,
        model.processor.stop_ids,
        logits_processor=LogitsProcessorList([] if processor is None else [processor]),
        stopping_criteria=StoppingCriteriaList([stop for stop in stops if stop is not None]),
    )
    if isinstance(processor, _Picking) and decoding.logprobs:
        return ids.tolist(), TokenLogprobs.stacked(processor.logprobs).cpu()
    return ids.tolist(), None


class _Picking:
    """A logits processor of transformers that leaves a picker's tokens alone to choose from.

    Each row has one branch. `logprobs` has the tokens' log-probabilities, [B] a step.
    """

    def __init__(self, picker: Picker) -> None:
        self.picker = picker
        self.logprobs: list[TokenLogprobs] = []
        self.begin: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # The ids begin with what is before the answer, such as a decoder's start token.
        self.begin = input_ids.shape[1] if self.begin is None else self.begin
        written = input_ids[:, None, self.begin :]
        tokens, logprobs = self.picker.of_logits(scores.float()[:, None], written)
        if logprobs is not None:
            self.logprobs.append(logprobs[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)


class _Penalising:
    """A logits processor of transformers for a picker's penalty, in a beam search."""

    def __init__(self, picker: Picker) -> None:
        self.picker = picker
        self.begin: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.begin = input_ids.shape[1] if self.begin is None else self.begin
        return self.picker.penalised(scores, input_ids[:, self.begin :])


class _StopStrings:
    """A criterion of transformers that ends rows whose text holds a stop string."""

    def __init__(self, reader: AnswerReader) -> None:
        self.reader = reader
        self.begin: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.begin = input_ids.shape[1] - 1 if self.begin is None else self.begin
        rows = input_ids[:, self.begin :].tolist()
        ended = [self.reader.holds_stop(row) for row in rows]
        return torch.tensor(ended, device=input_ids.device)
