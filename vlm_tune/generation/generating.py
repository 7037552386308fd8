"""Answers by transformers' `generate`: beam search, and models that are not continued here.

Shapes: B rows, N new tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from vlm_tune.data.types import Batch
from vlm_tune.generation.answers import AnswerReader, up_to_stop
from vlm_tune.generation.picking import Picker, penalising_processor, picking_processor
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.vlm import VisionLanguageNetwork


@torch.inference_mode()
def generate(model: VisionLanguageNetwork, batch: Batch, decoding: Decoding) -> list[list[int]]:
    """Generates the new ids of each row, greedily or by beam search, up to the first stop id.

    A decoder's rows must be padded on the left.
    """
    stops = model.processor.stop_ids
    pad = model.processor.spec.pad_id
    ids = model.llm.generate(model.embed(batch), batch.attention_mask, decoding, pad, stops)
    return [up_to_stop(row, stops) for row in ids.tolist()]


@torch.inference_mode()
def generated(
    model: VisionLanguageNetwork,
    batch: Batch,
    decoding: Decoding,
    picker: Picker,
    reader: AnswerReader,
    streamer: Any = None,
    criteria: Any = None,
) -> tuple[list[list[int]], list[list[float]] | None]:
    """Generates the new ids of rows, and if they are wanted the ids' log-probabilities.

    Args:
        model: the model.
        batch: rows of one prompt each, for a decoder padded on the left.
        decoding: how answers are generated.
        picker: chooses the rows' tokens.
        reader: reads their texts.
        streamer: a `BaseStreamer` of transformers.
        criteria: a further criterion of transformers by which generation stops.

    Returns:
        The ids, which may go on after their end: of a beam search those of all beams to return,
        row by row.
    """
    from transformers import LogitsProcessorList, StoppingCriteriaList

    logprobs: list[torch.Tensor] = []
    options: dict[str, Any] = {}
    if decoding.num_beams > 1:
        if picker.prompts is not None:
            processor = penalising_processor(picker, decoding.num_beams)
            options["logits_processor"] = LogitsProcessorList([processor])
    elif not decoding.plain:
        processor = picking_processor(picker, logprobs)
        options["logits_processor"] = LogitsProcessorList([processor])
    stopping = [each for each in (criteria, _string_criteria(reader)) if each is not None]
    if stopping:
        options["stopping_criteria"] = StoppingCriteriaList(stopping)
    if streamer is not None:
        options["streamer"] = streamer
    ids = model.llm.generate(
        model.embed(batch),
        batch.attention_mask,
        decoding,
        model.processor.spec.pad_id,
        model.processor.stop_ids,
        **options,
    )
    of_ids = torch.stack(logprobs, 1).tolist() if logprobs else None
    return ids.tolist(), of_ids


def _string_criteria(reader: AnswerReader) -> Any:
    """A criterion of transformers that ends rows whose text holds a stop string, or None."""
    from transformers import StoppingCriteria

    if not reader.stop_strings:
        return None

    class StopStrings(StoppingCriteria):
        def __init__(self) -> None:
            self.before: int | None = None

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            # The ids begin with what is before the answer, such as a decoder's start token.
            if self.before is None:
                self.before = input_ids.shape[1] - 1
            ended = [reader.holds_stop(row) for row in input_ids[:, self.before :].tolist()]
            return torch.tensor(ended, device=input_ids.device)

    return StopStrings()
