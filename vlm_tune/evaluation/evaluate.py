"""Scoring of a model: its generated answers, and the loss of the reference answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from vlm_tune.data.batching.collate import Fetch, collate
from vlm_tune.data.images.decode import PixelCache
from vlm_tune.data.types import IGNORE_INDEX, Batch, Conversation, Media, References, distinct_media
from vlm_tune.errors import DataError
from vlm_tune.evaluation.metrics import Answer, Losses, Scores, scores
from vlm_tune.evaluation.texts import normalise
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
    perplexity: bool = False,
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
        perplexity: also compute it for each answer by itself, for the metric of that name.
        compile: as `train.compile` in a recipe: whether the blocks are compiled for the prefill.
        progress: called with the number of answered rows and their total.

    Raises:
        DataError: there are no conversations, or a prompt is too long.
    """
    if not conversations:
        raise DataError("no rows to evaluate")
    prompts = model.processor.prompts(conversations)
    fetch = features or PixelCache(model.processor.images)
    with reading(model.llm, compile, len(prompts)):
        generated = answer_prompts(
            model,
            prompts,
            decoding,
            fetch=fetch,
            cached=features is not None,
            batch_size=batch_size,
            progress=progress,
        )
    losses: Losses = {}
    answers = _answers(conversations, generated)
    if loss and not perplexity:
        for name in dict.fromkeys(row.source_name for row in conversations):
            rows = [row for row in conversations if row.source_name == name]
            losses[name] = _loss(model, rows, batch_size, features, fetch)
    if perplexity:
        row_losses = _row_losses(model, conversations, batch_size, features, fetch)
        answers = [
            replace(answer, loss=total, tokens=tokens)
            for answer, (total, tokens) in zip(answers, row_losses, strict=True)
        ]
    if loss and perplexity:  # one pass gives both
        for answer in answers:
            total, tokens = losses.get(answer.source, (0.0, 0))
            losses[answer.source] = total + answer.loss, tokens + answer.tokens
    return scores(answers, losses)


def _answers(conversations: Sequence[Conversation], generated: Sequence[str]) -> list[Answer]:
    answers = []
    # Bytes that come with a row are hashed once, and not for each question about them.
    plain = [conversation.without_shots() for conversation in conversations]
    names = {item: _identity(item) for item in distinct_media(plain)}
    for conversation, text in zip(conversations, generated, strict=True):
        expected = conversation.messages[-1].text.strip()
        media = conversation.without_shots().media
        answers.append(
            Answer(
                id=conversation.id,
                image=media[0].name if media else "",
                question=conversation.question,
                expected=expected,
                generated=text,
                correct=normalise(text) == normalise(expected),
                category=conversation.category,
                source=conversation.source_name,
                images=tuple(dict.fromkeys(names[item] for item in media)),
                references=_scored(conversation.references),
            )
        )
    return answers


def _scored(references: References) -> References:
    """The references that metrics use: a folder's thousand classes are not part of every answer."""
    if references.form != "classify":
        return references
    return replace(references, choices=(), chosen=None)


def _identity(media: Media) -> str:
    """A name unique to an image: its path, or a digest of bytes that came with the row."""
    if isinstance(media.source, bytes):
        return f"sha256:{hashlib.sha256(media.source).hexdigest()[:32]}"
    return media.name


def _batches(
    model: VisionLanguageNetwork,
    conversations: Sequence[Conversation],
    batch_size: int,
    features: Fetch | None,
    fetch: Fetch,
) -> Iterator[tuple[list[int], Batch]]:
    """Batches of whole rows, by length, with the number of each example's conversation."""
    examples = [
        (number, example)
        for number, conversation in enumerate(conversations)
        for example in model.processor.examples(conversation)
    ]
    examples.sort(key=lambda pair: len(pair[1].input_ids))
    for start in range(0, len(examples), batch_size):
        chosen = examples[start : start + batch_size]
        batch = collate(
            [example for _, example in chosen],
            model.processor.spec,
            fetch=fetch,
            cached=features is not None,
        )
        yield [number for number, _ in chosen], batch.to(model.device)


@torch.inference_mode()
def _loss(
    model: VisionLanguageNetwork,
    conversations: Sequence[Conversation],
    batch_size: int,
    features: Fetch | None,
    fetch: Fetch,
) -> tuple[float, int]:
    """Summed cross-entropy of the reference answers, and their number of tokens."""
    total = 0.0
    count = 0
    for _, batch in _batches(model, conversations, batch_size, features, fetch):
        outcome: Any = model(batch)
        total = total + float(outcome.sum)
        count = count + outcome.count
    return total, count


@torch.inference_mode()
def _row_losses(
    model: VisionLanguageNetwork,
    conversations: Sequence[Conversation],
    batch_size: int,
    features: Fetch | None,
    fetch: Fetch,
) -> list[tuple[float, int]]:
    """Summed cross-entropy of each row's reference answers, and their number of tokens."""
    losses = [(0.0, 0)] * len(conversations)
    for numbers, batch in _batches(model, conversations, batch_size, features, fetch):
        hidden, targets = model.llm.supervised(model.embed(batch), batch)
        counts = (batch.on_host.labels != IGNORE_INDEX).sum(1).tolist()
        rows = zip(numbers, hidden.split(counts), targets.split(counts), strict=True)
        for number, row_hidden, row_targets in rows:
            total, tokens = losses[number]
            row_loss = float(model.llm.loss(model.llm, row_hidden, row_targets))
            losses[number] = total + row_loss, tokens + len(row_targets)
    return losses
