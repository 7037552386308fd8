"""Scoring of a model: exact match of generated answers, and the loss of the reference answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vlm_tune.data.batching.collate import Fetch, collate
from vlm_tune.data.images.decode import PixelCache
from vlm_tune.data.types import Conversation
from vlm_tune.errors import DataError
from vlm_tune.evaluation.metrics import Answer, Losses, Scores, normalise, scores
from vlm_tune.generation.answering import answer_prompts
from vlm_tune.model.acceleration.compiling import reading
from vlm_tune.model.language.decoding import Decoding
from vlm_tune.model.vlm import VisionLanguageNetwork, in_eval_mode


@in_eval_mode
def score(
    model: VisionLanguageNetwork,
    conversations: Sequence[Conversation],
    *,
    decoding: Decoding,
    batch_size: int = 64,
    features: Fetch | None = None,
    loss: bool = True,
    compile: bool | str = False,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Generates the last answer of every conversation and compares it with the reference.

    Args:
        model: the model; its training mode is restored at the end.
        conversations: the rows to score; each ends in the reference answer.
        decoding: how answers are generated.
        batch_size: rows per batch.
        features: cached features of a frozen tower; pixels are decoded where None.
        loss: also compute the loss of the reference answers, by source.
        compile: as `train.compile` in a recipe: whether the blocks are compiled for the prefill.
        progress: called with the number of answered rows and their total.

    Raises:
        DataError: there are no conversations, or a prompt is too long.
    """
    if not conversations:
        raise DataError("no rows to evaluate")
    processor = model.processor
    prompts = processor.prompts(conversations)
    fetch = features or PixelCache(processor.images)
    cached = features is not None
    with reading(model.llm, compile, len(prompts)):
        generated = answer_prompts(
            model,
            prompts,
            decoding,
            fetch=fetch,
            cached=cached,
            batch_size=batch_size,
            progress=progress,
        )
    losses: Losses = {}
    for name in dict.fromkeys(row.source_name for row in conversations) if loss else ():
        rows = [row for row in conversations if row.source_name == name]
        losses[name] = _loss(model, rows, batch_size, features, fetch)
    return scores(_answers(conversations, generated), losses)


def _answers(conversations: Sequence[Conversation], generated: Sequence[str]) -> list[Answer]:
    answers = []
    for conversation, text in zip(conversations, generated, strict=True):
        expected = conversation.messages[-1].text.strip()
        correct = normalise(text) == normalise(expected)
        question = next((m.text for m in reversed(conversation.messages) if m.role == "user"), "")
        image = conversation.media[0].name if conversation.media else ""
        answers.append(
            Answer(
                conversation.id,
                image,
                question,
                expected,
                text,
                correct,
                conversation.category,
                conversation.source_name,
            )
        )
    return answers


@torch.inference_mode()
def _loss(
    model: VisionLanguageNetwork,
    conversations: Sequence[Conversation],
    batch_size: int,
    features: Fetch | None,
    fetch: Fetch,
) -> tuple[float, int]:
    """Summed cross-entropy of the reference answers, and their number of tokens."""
    examples = [
        example
        for conversation in conversations
        for example in model.processor.examples(conversation)
    ]
    examples.sort(key=lambda example: len(example.input_ids))
    total = 0.0
    count = 0
    for start in range(0, len(examples), batch_size):
        chosen = examples[start : start + batch_size]
        outcome: Any = model(
            collate(chosen, model.processor.spec, fetch=fetch, cached=features is not None).to(
                model.device
            )
        )
        total = total + float(outcome.sum)
        count = count + outcome.count
    return total, count
